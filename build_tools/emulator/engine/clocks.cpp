#include "clocks.h"

namespace gnaforge::emulator {

void Clock::join_others(const CtaStamps& seen) {
  auto joined = others ? std::make_shared<CtaStamps>(*others) : std::make_shared<CtaStamps>();
  for (const auto& [cta, stamps] : seen) emulator::join((*joined)[cta], stamps);
  others = std::move(joined);
}

void ReaderPool::add(Epoch& slot, Epoch by) {
  Readers& readers = entries_[slot.stamp];
  readers.at[by.agent] = std::max(readers.at[by.agent], by.stamp);
  readers.strong &= by.strong;
}

void ReaderPool::spill(Accesses& last, Epoch by) {
  if (free_.empty()) {
    free_.push_back(static_cast<uint32_t>(entries_.size()));
    entries_.emplace_back();
  }
  Epoch many{free_.back(), kManyReaders, false};
  free_.pop_back();
  entries_[many.stamp] = {{}, true};
  for (const Epoch& slot : last.reads) add(many, slot);
  add(many, by);
  last.reads[0] = many;
  last.reads[1] = last.reads[2] = {};
}

const Epoch* ReaderPool::among(Epoch& slot, Epoch by, const Clock& clock) {
  const Readers& readers = entries_[slot.stamp];
  if (!(readers.strong && by.strong))
    for (size_t agent = 0; agent < kAgents; ++agent)
      if (readers.at[agent] > clock.at[agent] && !(by.stamp && agent == by.agent)) {
        found_ = {readers.at[agent], static_cast<uint8_t>(agent), readers.strong};
        return &found_;
      }
  release(slot);
  slot = {};
  return nullptr;
}

std::string name_of_agent(int agent) {
  if (agent < kFirstInitAgent) return "warp " + std::to_string(agent);
  if (agent < kTensorAgent) return "an mbarrier.init of warp " + std::to_string(agent - kFirstInitAgent);
  if (agent < kBulkStoreAgent) return "an MMA";
  if (agent < kFirstTensorWarpAgent) return "a bulk store";
  return agent < kFirstCopyAgent ? "warp " + std::to_string(agent - kFirstTensorWarpAgent) : "an asynchronous copy";
}

}  // namespace gnaforge::emulator
