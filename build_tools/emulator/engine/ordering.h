// PTX ISA, Memory Consistency Model: strong accesses, their semantics and scopes, release and acquire patterns.
#pragma once
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "clocks.h"
#include "running.h"
#include "types.h"

namespace gnaforge::emulator {

class Warp;
struct Instruction;

/// What an access or fence orders. `wide`: its scope reaches beyond the CTA. Bits fit Instruction::detail.
struct Ordering {
  bool strong, acquire, release, wide;
  static Ordering from_bits(int bits) { return {(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0}; }
  int bits() const { return strong | acquire << 1 | release << 2 | wide << 3; }
};
/// Of ld, st, atom, red and fence, from their modifiers. `weak_by_default`: without any, it is no strong access.
Ordering ordering_of(const Instruction& instruction, bool weak_by_default);

/// What threads have published through places in memory: release patterns for acquire patterns to find.
class SyncPlaces {
 public:
  /// A strong write. `replaces`: a store, which ends what earlier writers have published there; a read-modify-write
  /// doesn't.
  void publish(uint64_t address, Warp& warp, Ordering order, bool replaces);
  /// A strong read.
  void observe(uint64_t address, Warp& warp, Ordering order) const;

 private:
  struct Place {
    const Warp* writer = nullptr;
    uint32_t cta = ~0u;
    Clock narrow;    // for that CTA
    CtaStamps wide;  // for all
  };
  std::unordered_map<uint64_t, Place> places_;
};

/// fence.acq_rel, fence.sc, membar: makes what relaxed reads have observed count, and what came before follow relaxed
/// writes.
void fence(Warp& warp, Ordering order);

/// Accesses to device memory by a launch. Only pages that it has written are tracked, so what it merely reads costs
/// nothing.
class GlobalAccesses {
 public:
  GlobalAccesses(bool locked, bool checks) : locked_(locked), checks_(checks) {}
  /// Throws if another warp or CTA has written there and nothing orders that before.
  void read(uint64_t address, uint64_t size, uint32_t cta, const Clock& clock, Epoch by) {
    access(address, size, cta, clock, by, false);
  }
  /// Throws if another warp or CTA has accessed it and nothing orders that before.
  void write(uint64_t address, uint64_t size, uint32_t cta, const Clock& clock, Epoch by) {
    access(address, size, cta, clock, by, true);
  }
  void publish(uint64_t address, Warp& warp, Ordering order, bool replaces);
  void observe(uint64_t address, Warp& warp, Ordering order);
  /// All that was written so far.
  RunningWrites::Pages written() const;

 private:
  static constexpr uint64_t kPage = RunningWrites::kPage, kCell = RunningWrites::kCell;
  struct Past {
    uint32_t stamp = 0, cta : 24, agent : 8;
    Past() : cta(0), agent(0) {}
  };
  struct Cell {
    Past write, read;
    bool strong_write = false, strong_read = false;
  };
  void access(uint64_t address, uint64_t size, uint32_t cta, const Clock& clock, Epoch by, bool writes);
  static bool before(const Past& past, uint32_t cta, const Clock& clock);

  bool locked_, checks_;
  std::mutex mutex_;
  uint64_t first_ = ~uint64_t{0}, last_ = 0;  // pages written
  std::unordered_map<uint64_t, std::vector<Cell>> pages_;
  SyncPlaces places_;
};

}  // namespace gnaforge::emulator
