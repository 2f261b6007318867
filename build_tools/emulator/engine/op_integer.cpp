// PTX ISA: Integer Arithmetic Instructions; Extended-Precision Integer Arithmetic Instructions.
#include <limits>
#include <type_traits>

#include "opcodes.h"

namespace gnaforge::emulator {
namespace {

template <class T>
using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
template <class T>
using Unsigned = std::make_unsigned_t<T>;

template <class T>
struct Add {
  T operator()(T a, T b) const { return static_cast<T>(static_cast<Unsigned<T>>(a) + static_cast<Unsigned<T>>(b)); }
};
template <class T>
struct Sub {
  T operator()(T a, T b) const { return static_cast<T>(static_cast<Unsigned<T>>(a) - static_cast<Unsigned<T>>(b)); }
};
template <class T>
struct MulLo {
  T operator()(T a, T b) const { return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b)); }
};
template <class T>
struct MulHi {
  T operator()(T a, T b) const {
    using Product = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return static_cast<T>(static_cast<Product>(a) * static_cast<Product>(b) >> (8 * sizeof(T)));
  }
};
template <class T>
struct MadLo {
  T operator()(T a, T b, T c) const { return Add<T>{}(MulLo<T>{}(a, b), c); }
};
template <class T>
struct MadHi {
  T operator()(T a, T b, T c) const { return Add<T>{}(MulHi<T>{}(a, b), c); }
};
template <class T>
struct Min {
  T operator()(T a, T b) const { return a < b ? a : b; }
};
template <class T>
struct Max {
  T operator()(T a, T b) const { return a > b ? a : b; }
};
// Division by zero has no defined value in PTX; all ones is what hardware gives.
template <class T>
struct Div {
  T operator()(T a, T b) const {
    if (b == 0) return static_cast<T>(~Unsigned<T>{0});
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return Sub<T>{}(0, a);
    return static_cast<T>(a / b);
  }
};
template <class T>
struct Rem {
  T operator()(T a, T b) const {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return static_cast<T>(a % b);
  }
};
template <class T>
struct Abs {
  T operator()(T a) const { return a < 0 ? Sub<T>{}(0, a) : a; }
};
template <class T>
struct Neg {
  T operator()(T a) const { return Sub<T>{}(0, a); }
};
template <class T>
struct Sad {
  T operator()(T a, T b, T c) const { return Add<T>{}(c, a < b ? Sub<T>{}(b, a) : Sub<T>{}(a, b)); }
};
struct AddSaturated {
  int32_t operator()(int32_t a, int32_t b) const {
    int64_t sum = int64_t{a} + b;
    return static_cast<int32_t>(std::min<int64_t>(std::max<int64_t>(sum, INT32_MIN), INT32_MAX));
  }
};
struct SubSaturated {
  int32_t operator()(int32_t a, int32_t b) const {
    int64_t difference = int64_t{a} - b;
    return static_cast<int32_t>(std::min<int64_t>(std::max<int64_t>(difference, INT32_MIN), INT32_MAX));
  }
};

template <class T>
struct MulWide {
  Wide<T> operator()(T a, T b) const { return static_cast<Wide<T>>(a) * static_cast<Wide<T>>(b); }
};
template <class T>
struct MadWide {
  Wide<T> operator()(T a, T b, Wide<T> c) const {
    return static_cast<Wide<T>>(static_cast<uint64_t>(MulWide<T>{}(a, b)) + static_cast<uint64_t>(c));
  }
};
// A 16-bit product is 32 bits wide.
template <class T, class W>
struct MulWide16 {
  W operator()(T a, T b) const { return static_cast<W>(static_cast<W>(a) * static_cast<W>(b)); }
};
template <class T, class W>
struct MadWide16 {
  W operator()(T a, T b, W c) const {
    return static_cast<W>(static_cast<uint32_t>(MulWide16<T, W>{}(a, b)) + static_cast<uint32_t>(c));
  }
};

void decode_add(Instruction& in) {
  if (in.has("sat")) {
    if (in.type == Type::s32) lanewise<AddSaturated, int32_t, int32_t, int32_t>(in);
    return;
  }
  integer_lanewise<Add, 2>(in);
}
void decode_sub(Instruction& in) {
  if (in.has("sat")) {
    if (in.type == Type::s32) lanewise<SubSaturated, int32_t, int32_t, int32_t>(in);
    return;
  }
  integer_lanewise<Sub, 2>(in);
}
void decode_mul(Instruction& in) {
  if (in.has("lo")) return integer_lanewise<MulLo, 2>(in);
  if (in.has("hi")) return integer_lanewise<MulHi, 2>(in);
  if (!in.has("wide")) return;
  if (in.type == Type::u32) lanewise<MulWide<uint32_t>, uint64_t, uint32_t, uint32_t>(in);
  if (in.type == Type::s32) lanewise<MulWide<int32_t>, int64_t, int32_t, int32_t>(in);
  if (in.type == Type::u16) lanewise<MulWide16<uint16_t, uint32_t>, uint32_t, uint16_t, uint16_t>(in);
  if (in.type == Type::s16) lanewise<MulWide16<int16_t, int32_t>, int32_t, int16_t, int16_t>(in);
}
void decode_mad(Instruction& in) {
  if (in.has("lo")) return integer_lanewise<MadLo, 3>(in);
  if (in.has("hi")) return integer_lanewise<MadHi, 3>(in);
  if (!in.has("wide")) return;
  if (in.type == Type::u32) lanewise<MadWide<uint32_t>, uint64_t, uint32_t, uint32_t, uint64_t>(in);
  if (in.type == Type::s32) lanewise<MadWide<int32_t>, int64_t, int32_t, int32_t, int64_t>(in);
  if (in.type == Type::u16) lanewise<MadWide16<uint16_t, uint32_t>, uint32_t, uint16_t, uint16_t, uint32_t>(in);
  if (in.type == Type::s16) lanewise<MadWide16<int16_t, int32_t>, int32_t, int16_t, int16_t, int32_t>(in);
}

// The carry flag of each lane: add.cc, addc, sub.cc, subc.
template <class T, bool Subtract>
Status with_carry(Warp& warp, const Instruction& in, uint32_t mask) {
  bool use = in.detail[0], set = in.detail[1];
  const T *a = warp.in<T>(in.args[1]), *b = warp.in<T>(in.args[2]);
  T result[kWarpSize];
  each_lane(warp, mask, [&](int lane) {
    T carry = use ? static_cast<T>(warp.carry >> lane & 1) : T{0};
    T partial = Subtract ? a[lane] - b[lane] : a[lane] + b[lane];
    result[lane] = Subtract ? partial - carry : partial + carry;
    bool out = Subtract ? a[lane] < b[lane] || partial < carry : partial < a[lane] || result[lane] < partial;
    if (set) warp.carry = (warp.carry & ~(1u << lane)) | (out ? 1u << lane : 0u);
  });
  warp.put(in.args[0], mask, result);
  return Status::next;
}
void decode_carry(Instruction& in) {
  bool subtract = in.parts[0][0] == 's';
  in.detail[0] = in.parts[0].back() == 'c';
  in.detail[1] = in.has("cc");
  if (!in.detail[0] && !in.detail[1]) return;
  int size = size_of(in.type);
  expect_sizes(in, {size, size, size});
  if (size == 4) in.run = subtract ? with_carry<uint32_t, true> : with_carry<uint32_t, false>;
  if (size == 8) in.run = subtract ? with_carry<uint64_t, true> : with_carry<uint64_t, false>;
}

template <class T>
struct PopulationCount {
  uint32_t operator()(T a) const { return static_cast<uint32_t>(__builtin_popcountll(a)); }
};
template <class T>
struct LeadingZeros {
  uint32_t operator()(T a) const {
    return a ? static_cast<uint32_t>(__builtin_clzll(a)) - (64 - 8 * sizeof(T)) : 8 * sizeof(T);
  }
};
template <class T>
struct BitReverse {
  T operator()(T a) const {
    T out = 0;
    for (unsigned i = 0; i < 8 * sizeof(T); ++i) out = static_cast<T>(out | (a >> i & 1) << (8 * sizeof(T) - 1 - i));
    return out;
  }
};
template <class T, bool ShiftAmount>
struct FindBit {
  uint32_t operator()(T a) const {
    auto bits = static_cast<Unsigned<T>>(std::is_signed_v<T> && a < 0 ? ~a : a);
    if (bits == 0) return ~0u;
    uint32_t top = 63 - static_cast<uint32_t>(__builtin_clzll(bits));
    return ShiftAmount ? 8 * sizeof(T) - 1 - top : top;
  }
};
void decode_popc(Instruction& in) {
  if (in.type == Type::b32) lanewise<PopulationCount<uint32_t>, uint32_t, uint32_t>(in);
  if (in.type == Type::b64) lanewise<PopulationCount<uint64_t>, uint32_t, uint64_t>(in);
}
void decode_clz(Instruction& in) {
  if (in.type == Type::b32) lanewise<LeadingZeros<uint32_t>, uint32_t, uint32_t>(in);
  if (in.type == Type::b64) lanewise<LeadingZeros<uint64_t>, uint32_t, uint64_t>(in);
}
void decode_brev(Instruction& in) {
  if (in.type == Type::b32) lanewise<BitReverse<uint32_t>, uint32_t, uint32_t>(in);
  if (in.type == Type::b64) lanewise<BitReverse<uint64_t>, uint64_t, uint64_t>(in);
}
void decode_bfind(Instruction& in) {
  bool amount = in.has("shiftamt");
  if (in.type == Type::u32) {
    amount ? lanewise<FindBit<uint32_t, true>, uint32_t, uint32_t>(in)
           : lanewise<FindBit<uint32_t, false>, uint32_t, uint32_t>(in);
  } else if (in.type == Type::s32) {
    amount ? lanewise<FindBit<int32_t, true>, uint32_t, int32_t>(in)
           : lanewise<FindBit<int32_t, false>, uint32_t, int32_t>(in);
  } else if (in.type == Type::u64) {
    amount ? lanewise<FindBit<uint64_t, true>, uint32_t, uint64_t>(in)
           : lanewise<FindBit<uint64_t, false>, uint32_t, uint64_t>(in);
  }
}

// Bit fields: positions and lengths are taken from their low 8 bits, and fields end at the top bit.
template <class T>
struct ExtractBits {
  T operator()(T a, uint32_t position, uint32_t length) const {
    constexpr uint32_t kTop = 8 * sizeof(T) - 1;
    position &= 0xff;
    length &= 0xff;
    uint32_t sign_at = std::min(position + length, kTop + 1) - 1;
    bool sign = std::is_signed_v<T> && length > 0 && (static_cast<Unsigned<T>>(a) >> std::min(sign_at, kTop) & 1);
    Unsigned<T> out = sign ? ~Unsigned<T>{0} : Unsigned<T>{0};
    for (uint32_t i = 0; i <= kTop && i < length && position + i <= kTop; ++i) {
      Unsigned<T> bit = static_cast<Unsigned<T>>(a) >> (position + i) & 1;
      out = (out & ~(Unsigned<T>{1} << i)) | bit << i;
    }
    return static_cast<T>(out);
  }
};
template <class T>
struct InsertBits {
  T operator()(T field, T into, uint32_t position, uint32_t length) const {
    position &= 0xff;
    length &= 0xff;
    if (position >= 8 * sizeof(T) || length == 0) return into;
    T mask = length >= 8 * sizeof(T) ? ~T{0} : (T{1} << length) - 1;
    return (into & ~(mask << position)) | (field & mask) << position;
  }
};
void decode_bfe(Instruction& in) {
  if (in.type == Type::u32) lanewise<ExtractBits<uint32_t>, uint32_t, uint32_t, uint32_t, uint32_t>(in);
  if (in.type == Type::s32) lanewise<ExtractBits<int32_t>, int32_t, int32_t, uint32_t, uint32_t>(in);
  if (in.type == Type::u64) lanewise<ExtractBits<uint64_t>, uint64_t, uint64_t, uint32_t, uint32_t>(in);
  if (in.type == Type::s64) lanewise<ExtractBits<int64_t>, int64_t, int64_t, uint32_t, uint32_t>(in);
}
void decode_bfi(Instruction& in) {
  if (in.type == Type::b32) lanewise<InsertBits<uint32_t>, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>(in);
  if (in.type == Type::b64) lanewise<InsertBits<uint64_t>, uint64_t, uint64_t, uint64_t, uint32_t, uint32_t>(in);
}

/// prmt in its default mode: each nibble of c picks a byte of {b, a}, its top bit replicates the byte's sign.
struct PermuteBytes {
  uint32_t operator()(uint32_t a, uint32_t b, uint32_t c) const {
    uint64_t source = uint64_t{b} << 32 | a;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) {
      uint32_t pick = c >> (4 * i) & 15;
      uint32_t byte = static_cast<uint32_t>(source >> (8 * (pick & 7))) & 0xff;
      if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
      out |= byte << (8 * i);
    }
    return out;
  }
};
void decode_prmt(Instruction& in) { lanewise<PermuteBytes, uint32_t, uint32_t, uint32_t, uint32_t>(in); }

template <template <class> class F, int N>
void decode_integer(Instruction& in) {
  integer_lanewise<F, N>(in);
}

}  // namespace

std::vector<Opcode> integer_opcodes() {
  return {
      {"add", "Integer Arithmetic: add", decode_add, "sat"},
      {"sub", "Integer Arithmetic: sub", decode_sub, "sat"},
      {"mul", "Integer Arithmetic: mul", decode_mul, "lo hi wide"},
      {"mad", "Integer Arithmetic: mad", decode_mad, "lo hi wide"},
      {"div", "Integer Arithmetic: div", decode_integer<Div, 2>},
      {"rem", "Integer Arithmetic: rem", decode_integer<Rem, 2>},
      {"abs", "Integer Arithmetic: abs", decode_integer<Abs, 1>},
      {"neg", "Integer Arithmetic: neg", decode_integer<Neg, 1>},
      {"min", "Integer Arithmetic: min", decode_integer<Min, 2>},
      {"max", "Integer Arithmetic: max", decode_integer<Max, 2>},
      {"sad", "Integer Arithmetic: sad", decode_integer<Sad, 3>},
      {"add", "Extended-Precision Arithmetic: add.cc", decode_carry, "cc"},
      {"addc", "Extended-Precision Arithmetic: addc", decode_carry, "cc"},
      {"sub", "Extended-Precision Arithmetic: sub.cc", decode_carry, "cc"},
      {"subc", "Extended-Precision Arithmetic: subc", decode_carry, "cc"},
      {"popc", "Integer Arithmetic: popc", decode_popc},
      {"clz", "Integer Arithmetic: clz", decode_clz},
      {"brev", "Integer Arithmetic: brev", decode_brev},
      {"bfind", "Integer Arithmetic: bfind", decode_bfind, "shiftamt"},
      {"bfe", "Integer Arithmetic: bfe", decode_bfe},
      {"bfi", "Integer Arithmetic: bfi", decode_bfi},
      {"prmt", "Data Movement: prmt", decode_prmt},
  };
}

}  // namespace gnaforge::emulator
