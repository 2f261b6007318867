// Matrix instructions in flight: which registers and which shared memory it still uses.
#pragma once
#include <array>
#include <cstdint>
#include <deque>
#include <vector>

#include "tensor_memory.h"
#include "warp.h"

namespace gnaforge::emulator {

/// One warp's share of a wgmma.mma_async: 16 rows of the 64.
struct PendingMma {
  const Instruction* instruction;
  uint64_t descriptor_a = 0, descriptor_b = 0;
  bool accumulate = true, computed = false;
  std::vector<uint32_t> a;  // A fragments as they were when issued, where A is in registers
  uint64_t sequence = 0;    // its number in the warpgroup
};

struct MmaGroup {
  std::vector<PendingMma> mmas;
};

struct MatrixState {
  explicit MatrixState(uint32_t registers) : in_flight(registers), written(registers, 0) {}
  std::vector<uint16_t> in_flight;          // per register: wgmmas that use it
  std::vector<uint32_t> written;            // per register: the fence epoch of its last ordinary write
  uint32_t epoch = 1;                       // counts wgmma.fence
  int busy = 0;                             // wgmmas in flight
  std::vector<PendingMma> open;             // issued, not committed
  std::deque<MmaGroup> groups;              // committed
  uint64_t issued = 0;                      // for the comparison of a warpgroup's warps
  const Instruction* last = nullptr;        // the last wgmma or tcgen05.ld, for messages
  std::vector<uint32_t> loading;            // registers that tcgen05.ld writes, until tcgen05.wait::ld
  std::vector<TensorRegion> loads, stores;  // of tensor memory, until this warp waits

  /// Throws if an ordinary instruction touches registers in flight; notes what it writes.
  void check(const Instruction& instruction) {
    if (busy && touches(instruction)) {
      // Compilers copy what tcgen05.ld loads from the registers of inline assembly to others, for free: names change.
      if (loading.empty() || instruction.parts[0] != "mov" || in_flight_any(instruction.writes)) fail();
      for (uint32_t reg : instruction.writes) {
        ++in_flight[reg];
        ++busy;
        loading.push_back(reg);
      }
    }
    for (uint32_t reg : instruction.writes) written[reg] = epoch;
  }

 private:
  bool in_flight_any(const std::vector<uint32_t>& registers) const {
    for (uint32_t reg : registers)
      if (in_flight[reg]) return true;
    return false;
  }
  bool touches(const Instruction& instruction) const {
    return in_flight_any(instruction.reads) || in_flight_any(instruction.writes);
  }
  [[noreturn]] static void fail();
};

/// Decoded B matrices of recent wgmmas: all warps of a warpgroup, and often several warpgroups, read the same one.
struct DecodedMatrices {
  struct Entry {
    uint64_t descriptor = 0, version = ~uint64_t{0};  // of the shared memory that it was read from
    const Instruction* instruction = nullptr;
    std::vector<float> values;
  };
  std::array<Entry, 64> entries;
};

/// The wgmmas of a warpgroup in order. One is a single operation of four warps: it runs once all have issued it, and it
/// is complete for all when it is for one.
struct WarpgroupLog {
  struct Entry {
    const Instruction* instruction;
    uint64_t descriptor_a, descriptor_b;
    int issued = 0, retired = 0;  // warps
    bool complete = false;
    std::vector<uint32_t> chunks;  // of 16 bytes in shared memory that it reads
  };
  std::deque<Entry> entries;
  uint64_t forgotten = 0;  // entries that all four warps have waited for

  Entry& at(uint64_t sequence) { return entries[sequence - forgotten]; }
};

/// Whether all warps have issued what is in the groups that waiting for all but the newest `keep` covers.
bool all_issued(Warp& warp, size_t keep);
/// Completes all groups but the newest `keep`, and forgets them.
void retire_groups(Warp& warp, size_t keep);
/// Computes the oldest wgmma that is not computed; false if there is none.
bool compute_oldest(Warp& warp);

}  // namespace gnaforge::emulator
