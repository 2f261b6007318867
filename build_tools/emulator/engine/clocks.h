// Happens-before between the warps of a CTA, its asynchronous engines and other CTAs, as vector clocks.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace gnaforge::emulator {

// Who acts: warps, their mbarrier.inits (which have a fence of their own), the tensor core (in order), the wgmmas of
// each warpgroup, bulk stores and apart from them their reads; what each warp does in tensor memory, its MMAs included,
// as tcgen05.fence lets others see it; then, as they come, copies that complete on an mbarrier and the cp.async of a
// warp.
constexpr int kFirstInitAgent = 32, kTensorAgent = 64, kFirstWarpgroupAgent = 65, kBulkStoreAgent = 73,
              kBulkReadAgent = 74, kFirstTensorWarpAgent = 75, kFirstCopyAgent = 107, kAgents = 192;

using Stamps = std::array<uint32_t, kAgents>;
inline void join(Stamps& into, const Stamps& other) {
  for (size_t i = 0; i < kAgents; ++i) into[i] = std::max(into[i], other[i]);
}

/// What has been seen of CTAs, by their linear number.
using CtaStamps = std::map<uint32_t, Stamps>;

struct Clock {
  Stamps at{};
  std::shared_ptr<const CtaStamps> others;  // null for most: nothing of other CTAs
  void join(const Clock& other) {
    emulator::join(at, other.at);
    if (other.others && other.others != others) join_others(*other.others);
  }
  void join_others(const CtaStamps& seen);
};

/// An access: by whom, and when by that one's own count. Stamp 0 is no access. Strong ones don't race with each other.
struct Epoch {
  uint32_t stamp = 0;
  uint8_t agent = 0;
  bool strong = false;
  bool before(const Clock& observer) const { return observer.at[agent] >= stamp; }
  /// Whether `later` by that observer can't race with this.
  bool ordered(Epoch later, const Clock& observer) const {
    return before(observer) || (strong && later.strong) || (later.stamp && agent == later.agent);
  }
};

/// Who accesses tensor memory, and what that one has seen: of everything, and of tensor memory through tcgen05.fence.
struct TensorAccess {
  const Clock &clock, &fenced_clock;
  Epoch by, fenced_by;
};

/// The last write to a piece of memory and the reads since. Three readers that are not ordered fit here, more in the
/// pool.
struct Accesses {
  Epoch write, reads[3];
};
class ReaderPool {
 public:
  /// Notes a read. Returns the write that it races with, if any.
  const Epoch* read(Accesses& last, Epoch by, const Clock& clock) {
    if (!last.write.ordered(by, clock)) return &last.write;
    for (Epoch& slot : last.reads) {
      if (slot.agent == kManyReaders) {
        add(slot, by);
        return nullptr;
      }
      if (slot.agent == by.agent || slot.before(clock)) {
        by.strong &= slot.strong || slot.stamp == 0 || slot.agent != by.agent;
        slot = by;
        return nullptr;
      }
    }
    spill(last, by);
    return nullptr;
  }
  /// Notes a write, after which earlier accesses are forgotten. Returns an access that it races with, if any.
  const Epoch* write(Accesses& last, Epoch by, const Clock& clock, bool& was_read) {
    was_read = false;
    if (!last.write.ordered(by, clock)) return &last.write;
    was_read = true;
    for (Epoch& slot : last.reads) {
      if (slot.agent == kManyReaders) {
        if (const Epoch* other = among(slot, by, clock)) return other;
      } else if (!slot.ordered(by, clock)) {
        return &slot;
      }
    }
    last = {by, {}};
    return nullptr;
  }
  /// A write that was checked when it began.
  void overwrite(Accesses& last, Epoch by) {
    if (last.reads[0].agent == kManyReaders) release(last.reads[0]);
    last = {by, {}};
  }

 private:
  static constexpr uint8_t kManyReaders = 255;  // then `stamp` is a place in the pool
  void add(Epoch& slot, Epoch by);
  void spill(Accesses& last, Epoch by);
  const Epoch* among(Epoch& slot, Epoch by, const Clock& clock);
  void release(const Epoch& slot) { free_.push_back(slot.stamp); }

  struct Readers {
    Stamps at;
    bool strong;
  };
  std::vector<Readers> entries_;
  std::vector<uint32_t> free_;
  Epoch found_;
};

std::string name_of_agent(int agent);

}  // namespace gnaforge::emulator
