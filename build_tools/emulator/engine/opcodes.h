// How the instruction table is put together: each family gives a list of opcodes with the function that decodes them.
#pragma once
#include <algorithm>
#include <initializer_list>
#include <tuple>
#include <utility>
#include <vector>

#include "cta.h"
#include "program.h"
#include "warp.h"

namespace gnaforge::emulator {

/// An opcode, the PTX ISA section that defines it, and its decoder: sets `run`, or leaves it if the form isn't its own.
struct Opcode {
  const char* name;
  const char* section;
  void (*decode)(Instruction&);
  const char* modifiers = "";  // that it knows, types apart: with any other it isn't asked. "m64n*": whatever follows
};

std::vector<Opcode> integer_opcodes();
std::vector<Opcode> logic_opcodes();
std::vector<Opcode> float_opcodes();
std::vector<Opcode> convert_opcodes();
std::vector<Opcode> data_opcodes();
std::vector<Opcode> atomic_opcodes();
std::vector<Opcode> control_opcodes();
std::vector<Opcode> warp_opcodes();
std::vector<Opcode> mbarrier_opcodes();
std::vector<Opcode> copy_opcodes();
std::vector<Opcode> matrix_opcodes();
std::vector<Opcode> mma_opcodes();
std::vector<Opcode> tcgen05_opcodes();
std::vector<Opcode> tcgen05_copy_opcodes();

/// Throws unless the register operands have these sizes in bytes (0: a predicate, -1: any).
void expect_sizes(const Instruction& instruction, std::initializer_list<int> sizes);
void expect_count(const Instruction& instruction, size_t least, size_t most);

/// Applies F to every lane: arguments A... from operands 1 and up, the result R into operand 0.
template <class F, class R, class... A>
struct Lanewise {
  template <size_t... I>
  static void compute(Warp& warp, const Instruction& in, R* result, std::index_sequence<I...>) {
    std::tuple<const A*...> sources{warp.in<A>(in.args[I + 1])...};
    F f;
    for (int lane = 0; lane < kWarpSize; ++lane) result[lane] = f(std::get<I>(sources)[lane]...);
  }
  static Status run(Warp& warp, const Instruction& in, uint32_t mask) {
    alignas(64) R result[kWarpSize];
    compute(warp, in, result, std::index_sequence_for<A...>{});
    warp.put(in.args[0], mask, result);
    return Status::next;
  }
};

/// The handler of a lanewise operation, after checking the operands' sizes.
template <class F, class R, class... A>
void lanewise(Instruction& in) {
  expect_count(in, 1 + sizeof...(A), 1 + sizeof...(A));
  expect_sizes(in, {sizeof(R), sizeof(A)...});
  in.run = Lanewise<F, R, A...>::run;
}

/// Picks F<T> for the instruction's integer type; .b types count as unsigned.
template <template <class> class F, int Sources>
void integer_lanewise(Instruction& in) {
  auto pick = [&](auto zero) {
    using T = decltype(zero);
    if constexpr (Sources == 1) lanewise<F<T>, T, T>(in);
    if constexpr (Sources == 2) lanewise<F<T>, T, T, T>(in);
    if constexpr (Sources == 3) lanewise<F<T>, T, T, T, T>(in);
  };
  switch (in.type) {
    case Type::u16:
    case Type::b16: return pick(uint16_t{});
    case Type::s16: return pick(int16_t{});
    case Type::u32:
    case Type::b32: return pick(uint32_t{});
    case Type::s32: return pick(int32_t{});
    case Type::u64:
    case Type::b64: return pick(uint64_t{});
    case Type::s64: return pick(int64_t{});
    default: return;
  }
}

/// Runs a block for each lane in `mask`, with `warp.lane` set for messages.
template <class F>
void each_lane(Warp& warp, uint32_t mask, F&& f) {
  for (; mask; mask &= mask - 1) {
    warp.lane = __builtin_ctz(mask);
    f(warp.lane);
  }
}

/// The state space that the opcode names.
Space space_of(const Instruction& instruction);

}  // namespace gnaforge::emulator
