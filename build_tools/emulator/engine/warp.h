// A warp: 32 lanes, their registers, and the groups of lanes that share a program counter.
#pragma once
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <vector>

#include "clocks.h"
#include "program.h"

namespace gnaforge::emulator {

class Cta;
struct MatrixState;

/// What a warp counts between the markers that kernels may hold (pmevent, see op_control.cpp).
struct TileMarks {
  uint64_t executed = 0;  // instructions so far, without markers
  uint64_t start = 0;     // the same when the tile under way began
  bool inside = false, shell = false;
  uint64_t tiles[2] = {}, instructions[2] = {};  // of interior and of shell tiles
  void begin() {
    inside = true;
    shell = false;
    start = executed;
  }
  /// Ends the tile under way, if there is one.
  void end() {
    if (!inside) return;
    ++tiles[shell];
    instructions[shell] += executed - start;
    inside = false;
  }
};

/// Lanes at the same instruction. `token` is what a barrier that they have entered gave them.
struct Group {
  uint32_t pc, mask;
  uint64_t blocked_at;  // the CTA's event count when it last found itself blocked
  uint64_t token;
};
constexpr uint64_t kRunnable = ~uint64_t{0};

struct Frame {
  uint32_t pc;    // to return to
  uint32_t call;  // the calling instruction
};

class Warp {
 public:
  Warp(Cta& cta, int index, uint32_t alive);
  ~Warp();

  Cta& cta;
  const int index;
  uint32_t alive;
  std::vector<Group> groups;
  size_t current = 0;                     // of groups
  int lane = 0;                           // being executed, for messages
  uint32_t passed = 0;                    // after Status::blocked: lanes that went on nevertheless
  bool yields = false;                    // gives others a turn
  uint64_t stalled_at = kRunnable;        // event count when no group could run
  std::vector<std::vector<Frame>> calls;  // per lane
  std::vector<uint8_t> local;             // 32 times the module's local bytes
  Clock clock;                            // what this warp has seen
  Clock observed;                         // what relaxed reads have found published: counts from the next fence on
  Clock fenced,
      fenced_wide;      // what came before the last fence, of any scope or one beyond the CTA: follows relaxed writes
  uint32_t carry = 0;   // condition codes of the lanes
  uint32_t copies = 0;  // cp.async so far, and who stands for them; 0: nobody yet
  uint8_t copy_agent = 0;
  std::unique_ptr<MatrixState> matrix;  // wgmma in flight
  TileMarks marks;

  // What tcgen05.fence::after_thread_sync has let this warp see of tensor memory; the count that others see of what it
  // does there itself, once tcgen05.fence::before_thread_sync has come after it.
  Clock tensor_clock;
  uint32_t tensor_stamp = 1;

  size_t tensor_agent() const { return static_cast<size_t>(kFirstTensorWarpAgent + index); }
  TensorAccess tensor_access() const { return tensor_access(epoch()); }
  /// The same of an MMA, by the tensor core's count.
  TensorAccess tensor_access(Epoch by) const {
    return {clock, tensor_clock, by, {tensor_stamp, static_cast<uint8_t>(tensor_agent())}};
  }
  Epoch epoch(bool strong = false) const {
    return {clock.at[static_cast<size_t>(index)], static_cast<uint8_t>(index), strong};
  }
  /// What this warp has done so far, for others to join; what it does from now on is later.
  Clock publish() {
    Clock now = clock;
    ++clock.at[static_cast<size_t>(index)];
    return now;
  }

  Group& group() { return groups[current]; }
  int thread(int of_lane) const { return index * kWarpSize + of_lane; }

  /// A source operand's 32 lanes.
  template <class T>
  const T* in(const Operand& op) const {
    if (op.lanes) return reinterpret_cast<const T*>(op.lanes->data() + (sizeof(T) - 1) * 32);
    return reinterpret_cast<const T*>(registers() + op.slot);
  }
  template <class T>
  T* out(const Operand& op) {
    return reinterpret_cast<T*>(registers() + op.slot);
  }
  /// Writes the lanes in `mask`.
  template <class T>
  void put(const Operand& op, uint32_t mask, const T* values) {
    if (op.kind == Operand::Kind::sink) return;
    T* to = out<T>(op);
    if (mask == ~0u) {
      std::memcpy(to, values, sizeof(T) * kWarpSize);
    } else {
      for (; mask; mask &= mask - 1) {
        int i = __builtin_ctz(mask);
        to[i] = values[i];
      }
    }
  }
  uint32_t predicate(const Operand& op) const {
    uint32_t bits;
    if (op.lanes) {
      bits = op.value ? ~0u : 0u;
    } else {
      std::memcpy(&bits, registers() + op.slot, 4);
    }
    return op.negated ? ~bits : bits;
  }
  void put_predicate(const Operand& op, uint32_t mask, uint32_t bits) {
    if (op.kind == Operand::Kind::sink) return;
    uint32_t& to = *reinterpret_cast<uint32_t*>(registers() + op.slot);
    to = (to & ~mask) | (bits & mask);
  }
  /// A source operand of any width up to 64 bits, without sign extension.
  uint64_t bits(const Operand& op, int of_lane) const;
  void put_bits(const Operand& op, int of_lane, uint64_t value);
  /// Address of each lane: base register plus offset.
  uint64_t address(const Operand& op, int of_lane) const {
    if (!op.has_base) return static_cast<uint64_t>(op.value);
    if (size_of(op.type) == 4) return in<uint32_t>(op)[of_lane] + static_cast<uint64_t>(op.value);
    return in<uint64_t>(op)[of_lane] + static_cast<uint64_t>(op.value);
  }
  /// A 32-bit value that all lanes in `mask` must share.
  uint32_t uniform(const Operand& op, uint32_t mask, const char* what) const;

  uint8_t* registers() { return registers_; }
  const uint8_t* registers() const { return registers_; }

  /// Runs up to `budget` instructions; returns how many ran.
  uint64_t run(uint64_t budget);
  /// Removes lanes that have exited.
  void exit(uint32_t mask);
  /// Sends lanes elsewhere: they leave the current group.
  void jump(uint32_t mask, uint32_t target);

 private:
  template <bool Traced>
  uint64_t run_as(uint64_t budget);
  bool choose();
  void merge();

  std::unique_ptr<uint8_t[]> storage_;
  uint8_t* registers_;
};

}  // namespace gnaforge::emulator
