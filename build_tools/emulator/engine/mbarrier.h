// mbarrier objects (PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier").
#pragma once
#include <cstdint>
#include <string>
#include <unordered_map>

#include "clocks.h"
#include "trace.h"
#include "types.h"

namespace gnaforge::emulator {

class Warp;

struct Mbarrier {
  uint32_t expected = 0;     // arrivals of the next phase
  int64_t pending = 0;       // arrivals left in this phase
  int64_t transactions = 0;  // bytes left in this phase; may go below zero before expect_tx runs
  uint64_t phase = 0;        // completed phases
  uint32_t init_pc = 0;      // its mbarrier.init
  uint64_t arrivers = 0;     // warps that ever arrived, one bit each
  int last_warp = -1;        // that arrived last, at the instruction last_arrival
  uint32_t last_arrival = 0;
  uint8_t agent = 0;         // stands for the copies that complete here
  Epoch init;                // mbarrier.init
  uint64_t initialised = 0;  // when that was, and by which thread
  uint16_t initialiser = 0;
  Clock arrived, published;  // what its arrivals had seen; the same when the last phase ended
};

/// The mbarriers of one CTA, by shared address.
class Mbarriers {
 public:
  static constexpr int64_t kMaxCount = (1 << 20) - 1;

  Trace* trace = nullptr;  // hears of everything, if there is one
  const uint64_t* clock = nullptr;

  /// Stands for copies that complete together. There are not many: the last one is everybody's.
  uint8_t new_agent() { return static_cast<uint8_t>(agents_ < kAgents - 1 ? agents_++ : agents_); }
  /// mbarrier.init by the thread `warp.lane`.
  void init(uint32_t address, uint32_t count, Warp& warp);
  void invalidate(uint32_t address);
  /// True if the phase completed.
  bool arrive(uint32_t address, uint32_t count, const Clock& clock, bool drop = false);
  bool expect(uint32_t address, int64_t bytes);  // may complete it too: the bytes may have come before
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
  void note(const char* what, int64_t number, const char* of, uint32_t address) const;
  std::unordered_map<uint32_t, Mbarrier> barriers_;
  int agents_ = kFirstCopyAgent;
};

}  // namespace gnaforge::emulator
