// PTX ISA: shfl.sync; vote.sync, match.sync, activemask, redux.sync, elect.sync.
#include <algorithm>
#include <cmath>
#include <map>

#include "formats.h"
#include "opcodes.h"

namespace gnaforge::emulator {
namespace {

/// The lanes that take part now, or 0 if some that are named have not come yet.
/// Lanes at one instruction may name different sets: each set goes on its own.
uint32_t participants(Warp& warp, const Operand& members_op, uint32_t mask) {
  auto members_of = [&](int lane) { return static_cast<uint32_t>(warp.bits(members_op, lane)); };
  for (uint32_t rest = mask; rest;) {
    int lane = __builtin_ctz(rest);
    uint32_t members = members_of(lane);
    if (!(members >> lane & 1)) {
      warp.lane = lane;
      throw EmulationError("the lane is not in its own member mask " + hex(members));
    }
    uint32_t same = 0;
    for (uint32_t others = rest; others; others &= others - 1)
      if (members_of(__builtin_ctz(others)) == members) same |= others & -others;
    if ((same & members) == (members & warp.alive)) return same;
    rest &= ~same;
  }
  return 0;
}

/// Runs `f(lanes)` for each complete set of participants.
template <class F>
Status collective(Warp& warp, const Operand& members, uint32_t mask, F&& f) {
  uint32_t left = mask;
  while (left) {
    uint32_t lanes = participants(warp, members, left);
    if (!lanes) break;
    f(lanes);
    left &= ~lanes;
  }
  if (!left) return Status::next;
  warp.passed = mask & ~left;
  return Status::blocked;
}

enum Shuffle { up, down, butterfly, index };

Status shuffle(Warp& warp, const Instruction& in, uint32_t mask) {
  return collective(warp, in.args[4], mask, [&](uint32_t lanes) {
    const uint32_t* source = warp.in<uint32_t>(in.args[1]);
    uint32_t result[kWarpSize], inside = 0;
    each_lane(warp, lanes, [&](int lane) {
      auto amount = static_cast<int>(warp.bits(in.args[2], lane) & 31);
      auto control = static_cast<int>(warp.bits(in.args[3], lane));
      int segment = control >> 8 & 31, clamp = control & 31;
      int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
      int from = lane;
      bool valid = false;
      switch (in.detail[0]) {
        case up:
          from = lane - amount;
          valid = from >= last;
          break;
        case down:
          from = lane + amount;
          valid = from <= last;
          break;
        case butterfly:
          from = lane ^ amount;
          valid = from <= last;
          break;
        default:
          from = first | (amount & ~segment);
          valid = from <= last;
          break;
      }
      if (!valid) from = lane;
      if (!(lanes >> from & 1))
        throw EmulationError("shfl reads lane " + std::to_string(from) + ", which does not take part");
      inside |= uint32_t{valid} << lane;
      result[lane] = source[from];
    });
    const Operand& to = in.args[0];
    if (to.kind == Operand::Kind::vector) {
      warp.put(to.parts[0], lanes, result);
      warp.put_predicate(to.parts[1], lanes, inside);
    } else {
      warp.put(to, lanes, result);
    }
  });
}
void decode_shfl(Instruction& in) {
  static const char* const kModes[] = {"up", "down", "bfly", "idx"};  // in the order of Shuffle
  expect_count(in, 5, 5);
  expect_sizes(in, {-1, 4});
  for (int i = up; i <= index; ++i)
    if (in.has("sync") && in.has(kModes[i])) {
      in.detail[0] = i;
      in.run = shuffle;
    }
}

Status vote(Warp& warp, const Instruction& in, uint32_t mask) {
  return collective(warp, in.args[2], mask, [&](uint32_t lanes) {
    uint32_t yes = warp.predicate(in.args[1]) & lanes;
    switch (in.detail[0]) {
      case 0: return warp.put_predicate(in.args[0], lanes, yes == lanes ? ~0u : 0u);
      case 1: return warp.put_predicate(in.args[0], lanes, yes ? ~0u : 0u);
      case 2: return warp.put_predicate(in.args[0], lanes, yes == lanes || yes == 0 ? ~0u : 0u);
      default: each_lane(warp, lanes, [&](int lane) { warp.put_bits(in.args[0], lane, yes); });
    }
  });
}
void decode_vote(Instruction& in) {
  static const char* const kModes[] = {"all", "any", "uni", "ballot"};
  expect_count(in, 3, 3);
  for (int i = 0; i < 4; ++i)
    if (in.has("sync") && in.has(kModes[i])) {
      in.detail[0] = i;
      in.run = vote;
    }
}

Status match(Warp& warp, const Instruction& in, uint32_t mask) {
  return collective(warp, in.args[2], mask, [&](uint32_t lanes) {
    std::map<uint64_t, uint32_t> same;
    each_lane(warp, lanes, [&](int lane) { same[warp.bits(in.args[1], lane)] |= 1u << lane; });
    const Operand& to = in.args[0].kind == Operand::Kind::vector ? in.args[0].parts[0] : in.args[0];
    bool all = in.detail[0];
    each_lane(warp, lanes, [&](int lane) {
      uint32_t equal = same[warp.bits(in.args[1], lane)];
      warp.put_bits(to, lane, all ? (equal == lanes ? lanes : 0) : equal);
    });
    if (all && in.args[0].kind == Operand::Kind::vector)
      warp.put_predicate(in.args[0].parts[1], lanes, same.size() == 1 ? ~0u : 0u);
  });
}
void decode_match(Instruction& in) {
  expect_count(in, 3, 3);
  in.detail[0] = in.has("all");
  if (in.has("all") != in.has("any")) in.run = match;
}

Status active_mask(Warp& warp, const Instruction& in, uint32_t mask) {
  each_lane(warp, mask, [&](int lane) { warp.put_bits(in.args[0], lane, mask); });
  return Status::next;
}
void decode_activemask(Instruction& in) { in.run = active_mask; }

/// The leader is the lowest lane of the member mask: one choice per mask, as the ISA wants it.
Status elect(Warp& warp, const Instruction& in, uint32_t mask) {
  return collective(warp, in.args[1], mask, [&](uint32_t lanes) {
    int leader = __builtin_ctz(lanes);
    each_lane(warp, lanes, [&](int lane) { warp.put_bits(in.args[0].parts[0], lane, static_cast<uint64_t>(leader)); });
    warp.put_predicate(in.args[0].parts[1], lanes, 1u << leader);
  });
}
void decode_elect(Instruction& in) {
  expect_count(in, 2, 2);
  if (in.args[0].kind == Operand::Kind::vector) in.run = elect;
}

Status reduce(Warp& warp, const Instruction& in, uint32_t mask) {
  return collective(warp, in.args[2], mask, [&](uint32_t lanes) {
    const uint32_t* values = warp.in<uint32_t>(in.args[1]);
    uint32_t result = values[__builtin_ctz(lanes)];
    bool sign = in.type == Type::s32;
    each_lane(warp, lanes & (lanes - 1), [&](int lane) {
      uint32_t x = values[lane];
      if (in.type == Type::f32) {
        float a = as_float(result), b = as_float(x);
        result = as_bits(in.detail[0] == 1 ? std::fmin(a, b) : std::fmax(a, b));
        return;
      }
      switch (in.detail[0]) {
        case 0: result += x; break;
        case 1:
          result = sign ? static_cast<uint32_t>(std::min(static_cast<int32_t>(result), static_cast<int32_t>(x)))
                        : std::min(result, x);
          break;
        case 2:
          result = sign ? static_cast<uint32_t>(std::max(static_cast<int32_t>(result), static_cast<int32_t>(x)))
                        : std::max(result, x);
          break;
        case 3: result &= x; break;
        case 4: result |= x; break;
        default: result ^= x; break;
      }
    });
    each_lane(warp, lanes, [&](int lane) { warp.put_bits(in.args[0], lane, result); });
  });
}
void decode_redux(Instruction& in) {
  static const char* const kNames[] = {"add", "min", "max", "and", "or", "xor"};
  expect_count(in, 3, 3);
  in.detail[0] = -1;
  for (int i = 0; i < 6; ++i)
    if (in.has(kNames[i])) in.detail[0] = i;
  bool ordered = in.detail[0] == 1 || in.detail[0] == 2;
  if (in.detail[0] >= 0 && (in.type != Type::f32 || ordered)) in.run = reduce;
}

}  // namespace

std::vector<Opcode> warp_opcodes() {
  return {
      {"shfl", "Data Movement: shfl.sync", decode_shfl, "sync up down bfly idx"},
      {"vote", "Parallel Synchronization: vote.sync", decode_vote, "sync all any uni ballot"},
      {"match", "Parallel Synchronization: match.sync", decode_match, "sync all any"},
      {"activemask", "Parallel Synchronization: activemask", decode_activemask},
      {"elect", "Parallel Synchronization: elect.sync", decode_elect, "sync"},
      {"redux", "Parallel Synchronization: redux.sync", decode_redux, "sync add min max and or xor"},
  };
}

}  // namespace gnaforge::emulator
