// PTX ISA: Comparison and Selection Instructions; Logic and Shift Instructions.
#include <cmath>

#include "formats.h"
#include "opcodes.h"

namespace gnaforge::emulator {
namespace {

template <class T>
struct And {
  T operator()(T a, T b) const { return a & b; }
};
template <class T>
struct Or {
  T operator()(T a, T b) const { return a | b; }
};
template <class T>
struct Xor {
  T operator()(T a, T b) const { return a ^ b; }
};
template <class T>
struct Not {
  T operator()(T a) const { return static_cast<T>(~a); }
};
template <class T>
struct LogicalNot {
  T operator()(T a) const { return a == 0; }
};

// Predicates are one bit per lane, so a whole warp's are one word.
template <template <class> class F>
Status predicates(Warp& warp, const Instruction& in, uint32_t mask) {
  warp.put_predicate(in.args[0], mask, F<uint32_t>{}(warp.predicate(in.args[1]), warp.predicate(in.args[2])));
  return Status::next;
}
template <template <class> class F>
void decode_logic(Instruction& in) {
  if (in.type == Type::pred)
    in.run = predicates<F>;
  else
    integer_lanewise<F, 2>(in);
}
Status not_predicate(Warp& warp, const Instruction& in, uint32_t mask) {
  warp.put_predicate(in.args[0], mask, ~warp.predicate(in.args[1]));
  return Status::next;
}
void decode_not(Instruction& in) {
  if (in.type == Type::pred)
    in.run = not_predicate;
  else
    integer_lanewise<Not, 1>(in);
}
void decode_cnot(Instruction& in) { integer_lanewise<LogicalNot, 1>(in); }

// Shift amounts beyond the width shift everything out.
template <class T>
struct ShiftLeft {
  T operator()(T a, uint32_t n) const { return n >= 8 * sizeof(T) ? T{0} : static_cast<T>(a << n); }
};
template <class T>
struct ShiftRight {
  T operator()(T a, uint32_t n) const {
    constexpr uint32_t kBits = 8 * sizeof(T);
    if (n >= kBits) return std::is_signed_v<T> ? static_cast<T>(a >> (kBits - 1)) : T{0};
    return static_cast<T>(a >> n);
  }
};
void decode_shl(Instruction& in) {
  if (in.type == Type::b16) lanewise<ShiftLeft<uint16_t>, uint16_t, uint16_t, uint32_t>(in);
  if (in.type == Type::b32) lanewise<ShiftLeft<uint32_t>, uint32_t, uint32_t, uint32_t>(in);
  if (in.type == Type::b64) lanewise<ShiftLeft<uint64_t>, uint64_t, uint64_t, uint32_t>(in);
}
void decode_shr(Instruction& in) {
  switch (in.type) {
    case Type::b16:
    case Type::u16: return lanewise<ShiftRight<uint16_t>, uint16_t, uint16_t, uint32_t>(in);
    case Type::s16: return lanewise<ShiftRight<int16_t>, int16_t, int16_t, uint32_t>(in);
    case Type::b32:
    case Type::u32: return lanewise<ShiftRight<uint32_t>, uint32_t, uint32_t, uint32_t>(in);
    case Type::s32: return lanewise<ShiftRight<int32_t>, int32_t, int32_t, uint32_t>(in);
    case Type::b64:
    case Type::u64: return lanewise<ShiftRight<uint64_t>, uint64_t, uint64_t, uint32_t>(in);
    case Type::s64: return lanewise<ShiftRight<int64_t>, int64_t, int64_t, uint32_t>(in);
    default: return;
  }
}
template <bool Left, bool Wrap>
struct FunnelShift {
  uint32_t operator()(uint32_t low, uint32_t high, uint32_t n) const {
    n = Wrap ? n & 31 : std::min(n, 32u);
    uint64_t both = uint64_t{high} << 32 | low;
    return Left ? static_cast<uint32_t>(both << n >> 32) : static_cast<uint32_t>(n == 32 ? both >> 32 : both >> n);
  }
};
void decode_shf(Instruction& in) {
  bool left = in.has("l"), wrap = in.has("wrap");
  if (left == in.has("r") || wrap == in.has("clamp")) return;
  if (left && wrap) lanewise<FunnelShift<true, true>, uint32_t, uint32_t, uint32_t, uint32_t>(in);
  if (left && !wrap) lanewise<FunnelShift<true, false>, uint32_t, uint32_t, uint32_t, uint32_t>(in);
  if (!left && wrap) lanewise<FunnelShift<false, true>, uint32_t, uint32_t, uint32_t, uint32_t>(in);
  if (!left && !wrap) lanewise<FunnelShift<false, false>, uint32_t, uint32_t, uint32_t, uint32_t>(in);
}

/// lop3: bit 4a + 2b + c of the table decides.
Status lop3(Warp& warp, const Instruction& in, uint32_t mask) {
  const uint32_t *a = warp.in<uint32_t>(in.args[1]), *b = warp.in<uint32_t>(in.args[2]),
                 *c = warp.in<uint32_t>(in.args[3]);
  uint32_t result[kWarpSize] = {};
  for (int k = 0; k < 8; ++k) {
    if (!(in.args[4].value >> k & 1)) continue;
    uint32_t na = k & 4 ? 0 : ~0u, nb = k & 2 ? 0 : ~0u, nc = k & 1 ? 0 : ~0u;
    for (int i = 0; i < kWarpSize; ++i) result[i] |= (a[i] ^ na) & (b[i] ^ nb) & (c[i] ^ nc);
  }
  warp.put(in.args[0], mask, result);
  return Status::next;
}
void decode_lop3(Instruction& in) {
  expect_sizes(in, {4, 4, 4, 4, 4});
  in.run = lop3;
}

template <class T>
Status select(Warp& warp, const Instruction& in, uint32_t mask) {
  const T *a = warp.in<T>(in.args[1]), *b = warp.in<T>(in.args[2]);
  uint32_t which = warp.predicate(in.args[3]);
  T result[kWarpSize];
  for (int i = 0; i < kWarpSize; ++i) result[i] = which >> i & 1 ? a[i] : b[i];
  warp.put(in.args[0], mask, result);
  return Status::next;
}
void decode_selp(Instruction& in) {
  int size = size_of(in.type);
  expect_count(in, 4, 4);
  expect_sizes(in, {size, size, size, 0});
  if (size == 2) in.run = select<uint16_t>;
  if (size == 4) in.run = select<uint32_t>;
  if (size == 8) in.run = select<uint64_t>;
}

enum Comparison { eq, ne, lt, le, gt, ge, equ, neu, ltu, leu, gtu, geu, num, nan };

template <class T, class Value>
uint32_t compare(const T* a, const T* b, int how, Value&& value) {
  uint32_t bits = 0;
  for (int i = 0; i < kWarpSize; ++i) {
    auto x = value(a[i]), y = value(b[i]);
    bool unordered = x != x || y != y, is;
    switch (how) {
      case eq: is = x == y; break;
      case ne: is = x != y && !unordered; break;
      case lt: is = x < y; break;
      case le: is = x <= y; break;
      case gt: is = x > y; break;
      case ge: is = x >= y; break;
      case equ: is = x == y || unordered; break;
      case neu: is = x != y; break;
      case ltu: is = x < y || unordered; break;
      case leu: is = x <= y || unordered; break;
      case gtu: is = x > y || unordered; break;
      case geu: is = x >= y || unordered; break;
      case num: is = !unordered; break;
      default: is = unordered; break;
    }
    bits |= uint32_t{is} << i;
  }
  return bits;
}

uint32_t comparison(Warp& warp, const Instruction& in) {
  auto run = [&](auto zero) {
    using T = decltype(zero);
    return compare(warp.in<T>(in.args[1]), warp.in<T>(in.args[2]), in.detail[0], [](T x) { return x; });
  };
  switch (in.type) {
    case Type::b16:
    case Type::u16: return run(uint16_t{});
    case Type::s16: return run(int16_t{});
    case Type::b32:
    case Type::u32: return run(uint32_t{});
    case Type::s32: return run(int32_t{});
    case Type::b64:
    case Type::u64: return run(uint64_t{});
    case Type::s64: return run(int64_t{});
    case Type::f64: return run(double{});
    case Type::f16:
      return compare(warp.in<uint16_t>(in.args[1]), warp.in<uint16_t>(in.args[2]), in.detail[0], from_f16);
    case Type::bf16:
      return compare(warp.in<uint16_t>(in.args[1]), warp.in<uint16_t>(in.args[2]), in.detail[0], from_bf16);
    default:
      if (in.detail[2]) {
        auto flush = [](float x) { return std::fabs(x) < 1.17549435e-38f ? 0.0f : x; };
        return compare(warp.in<float>(in.args[1]), warp.in<float>(in.args[2]), in.detail[0], flush);
      }
      return run(float{});
  }
}

Status setp(Warp& warp, const Instruction& in, uint32_t mask) {
  uint32_t bits = comparison(warp, in), inverse = ~bits;
  if (in.detail[1]) {
    uint32_t other = warp.predicate(in.args[3]);
    auto combine = [&](uint32_t x) {
      return in.detail[1] == 1 ? x & other : in.detail[1] == 2 ? x | other : x ^ other;
    };
    bits = combine(bits);
    inverse = combine(inverse);
  }
  if (in.args[0].kind == Operand::Kind::vector) {
    warp.put_predicate(in.args[0].parts[0], mask, bits);
    warp.put_predicate(in.args[0].parts[1], mask, inverse);
  } else {
    warp.put_predicate(in.args[0], mask, bits);
  }
  return Status::next;
}
Status set_value(Warp& warp, const Instruction& in, uint32_t mask) {
  uint32_t bits = comparison(warp, in), result[kWarpSize];
  uint32_t yes = in.type2 == Type::f32 ? as_bits(1.0f) : ~0u;
  for (int i = 0; i < kWarpSize; ++i) result[i] = bits >> i & 1 ? yes : 0;
  warp.put(in.args[0], mask, result);
  return Status::next;
}

bool find_comparison(Instruction& in) {
  static const char* const kNames[] = {"eq",  "ne",  "lt",  "le",  "gt",  "ge",  "equ",
                                       "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};
  static const char* const kUnsigned[] = {"lo", "ls", "hi", "hs"};
  in.detail[0] = -1;
  for (int i = 0; i < 14; ++i)
    if (in.mode() == kNames[i]) in.detail[0] = i;
  for (int i = 0; i < 4; ++i)
    if (in.mode() == kUnsigned[i]) in.detail[0] = lt + i;
  in.detail[1] = in.has("and") ? 1 : in.has("or") ? 2 : in.has("xor") ? 3 : 0;
  in.detail[2] = in.has("ftz");
  int size = size_of(in.type);
  bool known = in.type != Type::f16x2 && in.type != Type::bf16x2 && size >= 2 && size <= 8;
  return known && in.detail[0] >= 0;
}
void decode_setp(Instruction& in) {
  if (!find_comparison(in)) return;
  int size = size_of(in.type);
  expect_count(in, in.detail[1] ? 4 : 3, in.detail[1] ? 4 : 3);
  expect_sizes(in, {-1, size, size});
  in.run = setp;
}
void decode_set(Instruction& in) {
  if (!find_comparison(in) || in.detail[1] || size_of(in.type2) != 4) return;
  expect_sizes(in, {4, size_of(in.type), size_of(in.type)});
  in.run = set_value;
}

}  // namespace

std::vector<Opcode> logic_opcodes() {
  static const char* const kComparisons =
      "eq ne lt le gt ge equ neu ltu leu gtu geu num nan lo ls hi hs and or xor ftz";
  return {
      {"and", "Logic and Shift: and", decode_logic<And>},
      {"or", "Logic and Shift: or", decode_logic<Or>},
      {"xor", "Logic and Shift: xor", decode_logic<Xor>},
      {"not", "Logic and Shift: not", decode_not},
      {"cnot", "Logic and Shift: cnot", decode_cnot},
      {"lop3", "Logic and Shift: lop3", decode_lop3},
      {"shl", "Logic and Shift: shl", decode_shl},
      {"shr", "Logic and Shift: shr", decode_shr},
      {"shf", "Logic and Shift: shf", decode_shf, "l r wrap clamp"},
      {"selp", "Comparison and Selection: selp", decode_selp},
      {"setp", "Comparison and Selection: setp", decode_setp, kComparisons},
      {"set", "Comparison and Selection: set", decode_set, kComparisons},
  };
}

}  // namespace gnaforge::emulator
