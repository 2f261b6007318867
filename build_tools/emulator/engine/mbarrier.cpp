#include "mbarrier.h"

#include "cta.h"

namespace gnaforge::emulator {

void Mbarriers::init(uint32_t address, uint32_t count, Warp& warp) {
  if (address % 8) throw EmulationError("mbarrier at " + hex(address) + " is not aligned to 8 bytes");
  if (count < 1 || count > kMaxCount)
    throw EmulationError("mbarrier count " + std::to_string(count) + " is not in 1..2^20-1");
  if (barriers_.count(address))
    throw EmulationError("mbarrier at " + hex(address) + " is initialised twice without mbarrier.inval");
  Mbarrier& barrier = barriers_[address];
  barrier.expected = count;
  barrier.pending = count;
  barrier.agent = new_agent();
  auto agent = static_cast<uint8_t>(kFirstInitAgent + warp.index);
  barrier.init = {++warp.clock.at[agent], agent};
  barrier.initialised = warp.cta.clock;
  barrier.initialiser = static_cast<uint16_t>(warp.thread(warp.lane));
}

void Mbarriers::invalidate(uint32_t address) {
  at(address);
  barriers_.erase(address);
}

Mbarrier& Mbarriers::at(uint32_t address) {
  auto found = barriers_.find(address);
  if (found == barriers_.end()) throw EmulationError("there is no initialised mbarrier at " + hex(address));
  return found->second;
}

Mbarrier& Mbarriers::used_by(uint32_t address, const Warp& warp) {
  Mbarrier& barrier = at(address);
  if (!barrier.init.before(warp.clock))
    throw EmulationError("race: the mbarrier at " + hex(address) + " is used, which " +
                         name_of_agent(barrier.init.agent) +
                         " has initialised, and nothing that this warp has waited for orders the two");
  return barrier;
}

const Mbarrier* Mbarriers::find(uint32_t address) const {
  auto found = barriers_.find(address);
  return found == barriers_.end() ? nullptr : &found->second;
}

bool Mbarriers::overlaps(uint32_t address, uint32_t size) const {
  for (const auto& entry : barriers_)
    if (address < entry.first + 8 && entry.first < address + size) return true;
  return false;
}

bool Mbarriers::arrive(uint32_t address, uint32_t count, const Clock& clock, bool drop) {
  Mbarrier& barrier = at(address);
  barrier.arrived.join(clock);
  if (count < 1 || count > kMaxCount) throw EmulationError("mbarrier arrive with count " + std::to_string(count));
  if (barrier.pending < static_cast<int64_t>(count))
    throw EmulationError("too many arrivals in one phase: " + describe(address) + ", " + std::to_string(count) +
                         " more arrive");
  barrier.pending -= count;
  if (trace) note("", count, " of the arrivals", address);
  if (drop) {
    if (barrier.expected < count) throw EmulationError("arrive_drop leaves a negative count: " + describe(address));
    barrier.expected -= count;
  }
  return settle(address, barrier);
}

bool Mbarriers::expect(uint32_t address, int64_t bytes) {
  Mbarrier& barrier = at(address);
  barrier.transactions += bytes;
  if (trace) note("", bytes, " bytes are expected", address);
  if (barrier.transactions > kMaxCount)
    throw EmulationError("mbarrier's transaction count exceeds 2^20-1: " + describe(address));
  return settle(address, barrier);
}

bool Mbarriers::complete(uint32_t address, int64_t bytes, const Clock& clock) {
  Mbarrier& barrier = at(address);
  barrier.arrived.join(clock);
  barrier.transactions -= bytes;
  if (trace) note("", bytes, " bytes have landed", address);
  if (barrier.transactions < -kMaxCount)
    throw EmulationError("mbarrier's transaction count falls below -(2^20-1): " + describe(address));
  return settle(address, barrier);
}

void Mbarriers::note(const char* what, int64_t number, const char* of, uint32_t address) const {
  trace->note(what + std::to_string(number) + of + ": " + describe(address), *clock);
}

bool Mbarriers::settle(uint32_t address, Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.transactions != 0) return false;
  ++barrier.phase;
  barrier.published = barrier.arrived;
  barrier.pending = barrier.expected;
  if (trace) note("phase ", static_cast<int64_t>(barrier.phase) - 1, " ends", address);
  return true;
}

std::string Mbarriers::describe(uint32_t address) const {
  const Mbarrier* barrier = find(address);
  if (!barrier) return "no mbarrier at " + hex(address);
  return "mbarrier " + hex(address) + " (phase " + std::to_string(barrier->phase) + ", parity " +
         std::to_string(barrier->phase & 1) + ", " + std::to_string(barrier->pending) + " of " +
         std::to_string(barrier->expected) + " arrivals and " + std::to_string(barrier->transactions) +
         " bytes pending)";
}

}  // namespace gnaforge::emulator
