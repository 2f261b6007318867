// PTX ISA: Parallel Synchronization and Communication Instructions: atom, red.
#include <cmath>

#include "formats.h"
#include "opcodes.h"
#include "reduction.h"

namespace gnaforge::emulator {

Reduction reduction_named(const std::vector<std::string>& parts) {
  struct Named {
    const char* name;
    Reduction reduction;
  };
  static constexpr Named kNames[] = {{"add", Reduction::add},       {"min", Reduction::min},
                                     {"max", Reduction::max},       {"inc", Reduction::inc},
                                     {"dec", Reduction::dec},       {"and", Reduction::bit_and},
                                     {"or", Reduction::bit_or},     {"xor", Reduction::bit_xor},
                                     {"exch", Reduction::exchange}, {"cas", Reduction::compare_swap}};
  for (const std::string& part : parts)
    for (const Named& entry : kNames)
      if (part == entry.name) return entry.reduction;
  return Reduction::none;
}

namespace {

template <class T>
T combined(Reduction operation, T old, T a) {
  if (operation == Reduction::add) return old + a;
  if (operation == Reduction::min) return old != old ? a : a != a ? old : std::min(old, a);
  return old != old ? a : a != a ? old : std::max(old, a);
}

template <class To, class From>
To reinterpreted(From from) {
  To to{};
  std::memcpy(&to, &from, std::min(sizeof to, sizeof from));
  return to;
}

}  // namespace

uint64_t reduced(Reduction operation, Type type, uint64_t old, uint64_t a, uint64_t b) {
  int size = size_of(type);
  uint64_t keep = size >= 8 ? ~uint64_t{0} : (uint64_t{1} << (8 * size)) - 1;
  old &= keep;
  a &= keep;
  if (operation == Reduction::add && !is_float(type)) return (old + a) & keep;  // signed types wrap too
  switch (operation) {
    case Reduction::inc: return old >= a ? 0 : old + 1;
    case Reduction::dec: return old == 0 || old > a ? a : old - 1;
    case Reduction::bit_and: return old & a;
    case Reduction::bit_or: return old | a;
    case Reduction::bit_xor: return old ^ a;
    case Reduction::exchange: return a;
    case Reduction::compare_swap: return old == a ? b & keep : old;
    default: break;
  }
  switch (type) {
    case Type::f32:
    case Type::tf32:
      return as_bits(combined(operation, as_float(static_cast<uint32_t>(old)), as_float(static_cast<uint32_t>(a))));
    case Type::f64:
      return reinterpreted<uint64_t>(combined(operation, reinterpreted<double>(old), reinterpreted<double>(a)));
    case Type::f16:
      return to_f16(combined(operation, from_f16(static_cast<uint16_t>(old)), from_f16(static_cast<uint16_t>(a))));
    case Type::bf16:
      return to_bf16(combined(operation, from_bf16(static_cast<uint16_t>(old)), from_bf16(static_cast<uint16_t>(a))));
    case Type::f16x2:
    case Type::bf16x2: {
      Type one = type == Type::f16x2 ? Type::f16 : Type::bf16;
      return reduced(operation, one, old & 0xffff, a & 0xffff) | reduced(operation, one, old >> 16, a >> 16) << 16;
    }
    case Type::s32:
      return static_cast<uint32_t>(combined(operation, static_cast<int32_t>(old), static_cast<int32_t>(a)));
    case Type::s64:
      return static_cast<uint64_t>(combined(operation, static_cast<int64_t>(old), static_cast<int64_t>(a)));
    default: return combined(operation, old, a) & keep;
  }
}

namespace {

/// detail: 0 the operation, 1 the address operand (1 in atom, 0 in red), 2 its ordering.
Status atomic(Warp& warp, const Instruction& in, uint32_t mask) {
  auto operation = static_cast<Reduction>(in.detail[0]);
  auto at = static_cast<size_t>(in.detail[1]);
  auto size = static_cast<uint32_t>(size_of(in.type));
  const Operand& data = in.args[at + 1];
  Ordering order = Ordering::from_bits(in.detail[2]);
  std::unique_lock<std::mutex> lock;
  if (warp.cta.launch.atomics) lock = std::unique_lock<std::mutex>(*warp.cta.launch.atomics);
  each_lane(warp, mask, [&](int lane) {
    uint64_t address = warp.address(in.args[at], lane), total = uint64_t{size} * in.width;
    warp.cta.read(warp, in.space, address, static_cast<uint32_t>(total), true);
    uint8_t* memory = warp.cta.write(warp, in.space, address, static_cast<uint32_t>(total), true);
    for (size_t i = 0; i < in.width; ++i) {
      uint64_t old = 0, a = warp.bits(in.width > 1 ? data.parts[i] : data, lane);
      std::memcpy(&old, memory + i * size, size);
      uint64_t b = operation == Reduction::compare_swap ? warp.bits(in.args[at + 2], lane) : 0;
      uint64_t value = reduced(operation, in.type, old, a, b);
      std::memcpy(memory + i * size, &value, size);
      if (at == 1) warp.put_bits(in.width > 1 ? in.args[0].parts[i] : in.args[0], lane, old);
    }
    if (at == 1) warp.cta.observe(warp, in.space, address, order);
    warp.cta.publish(warp, in.space, address, order, false);
  });
  warp.cta.progress();
  return Status::next;
}

void decode_atomic(Instruction& in) {
  in.detail[1] = in.parts[0] == "atom" ? 1 : 0;
  in.width = in.has("v2") ? 2 : in.has("v4") ? 4 : in.has("v8") ? 8 : 1;
  Reduction operation = reduction_named(in.parts);
  if (operation == Reduction::none || size_of(in.type) > 8 || size_of(in.type) < 2) return;
  bool swap = operation == Reduction::compare_swap;
  auto first = static_cast<size_t>(in.detail[1]);
  expect_count(in, first + (swap ? 3 : 2), first + 3);
  in.detail[0] = static_cast<int>(operation);
  in.detail[2] = ordering_of(in, false).bits();
  in.run = atomic;
}

}  // namespace

std::vector<Opcode> atomic_opcodes() {
  static const char* const kModifiers =
      "add min max inc dec and or xor exch cas noftz relaxed acquire release acq_rel cta cluster gpu sys "
      "global shared shared::cta shared::cluster v2 v4 v8 L2::cache_hint";
  return {
      {"atom", "Parallel Synchronization: atom", decode_atomic, kModifiers},
      {"red", "Parallel Synchronization: red", decode_atomic, kModifiers},
  };
}

}  // namespace gnaforge::emulator
