// mbarrier objects (PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier").
#pragma once
#include <cstdint>
#include <string>
#include <unordered_map>

#include "clocks.h"
#include "types.h"

namespace gnaforge::emulator {

class Warp;

struct Mbarrier {
  uint32_t expected = 0;    // arrivals of the next phase
  int64_t pending = 0;      // arrivals left in this phase
  int64_t transactions = 0; // bytes left in this phase; may go below zero before expect_tx runs
  uint64_t phase = 0;       // completed phases
  uint8_t agent = 0;        // stands for the copies that complete here
  Epoch init;               // mbarrier.init
  uint64_t initialised = 0; // when that was, and by which thread
  uint16_t initialiser = 0;
  Clock arrived, published; // what its arrivals had seen; the same when the last phase ended
};

/// The mbarriers of one CTA, by shared address.
class Mbarriers {
 public:
  static constexpr int64_t kMaxCount = (1 << 20) - 1;

  /// mbarrier.init by the thread `warp.lane`.
  void init(uint32_t address, uint32_t count, Warp& warp);
  void invalidate(uint32_t address);
  /// True if the phase completed.
  bool arrive(uint32_t address, uint32_t count, const Clock& clock, bool drop = false);
  void expect(uint32_t address, int64_t bytes);
  bool complete(uint32_t address, int64_t bytes, const Clock& clock);
  Mbarrier& at(uint32_t address);
  /// The mbarrier, for a warp that must have synchronised with its initialisation.
  Mbarrier& used_by(uint32_t address, const Warp& warp);
  const Mbarrier* find(uint32_t address) const;
  /// Whether any mbarrier overlaps these bytes.
  bool overlaps(uint32_t address, uint32_t size) const;
  std::string describe(uint32_t address) const;
  bool empty() const { return barriers_.empty(); }

 private:
  bool settle(uint32_t address, Mbarrier& barrier);
  std::unordered_map<uint32_t, Mbarrier> barriers_;
  int agents_ = kFirstBarrierAgent;
};

}  // namespace gnaforge::emulator
