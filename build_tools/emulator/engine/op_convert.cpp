// PTX ISA: Data Movement and Conversion Instructions: cvt.
#include <cmath>
#include <limits>

#include "formats.h"
#include "opcodes.h"

namespace gnaforge::emulator {
namespace {

/// An integer source: low bits of the register, sign-extended for signed types.
__int128 integer_source(uint64_t bits, Type type) {
  int width = 8 * size_of(type);
  if (width < 64) bits &= (uint64_t{1} << width) - 1;
  if (is_signed(type)) {
    auto shift = static_cast<unsigned>(64 - width);
    return static_cast<int64_t>(bits << shift) >> shift;
  }
  return bits;
}

double float_source(uint64_t bits, Type type) {
  switch (type) {
    case Type::f16: return from_f16(static_cast<uint16_t>(bits));
    case Type::bf16: return from_bf16(static_cast<uint16_t>(bits));
    case Type::f32: return as_float(static_cast<uint32_t>(bits));
    default: {
      double value;
      std::memcpy(&value, &bits, 8);
      return value;
    }
  }
}

struct Mode {
  Rounding rounding;
  bool integral, flush, saturate, relu;
};

Mode mode_of(const Instruction& in) {
  return {static_cast<Rounding>(in.detail[0]), (in.detail[1] & 1) != 0, (in.detail[1] & 2) != 0,
          (in.detail[1] & 4) != 0, (in.detail[1] & 8) != 0};
}

/// To an integer type, clamped to its range. NaN gives 0, but with 64 bits on either side the top bit alone.
uint64_t to_integer(double x, Type type, Type from, Rounding rounding) {
  int width = 8 * size_of(type);
  if (std::isnan(x)) return from == Type::f64 || width == 64 ? uint64_t{1} << (width - 1) : 0;
  double low = is_signed(type) ? -std::ldexp(1.0, width - 1) : 0.0;
  double high = std::ldexp(1.0, is_signed(type) ? width - 1 : width);
  double rounded = round_to_integer(x, rounding);
  if (rounded >= high)
    return is_signed(type) ? (uint64_t{1} << (width - 1)) - 1 : width == 64 ? ~uint64_t{0} : (uint64_t{1} << width) - 1;
  if (rounded < low) return is_signed(type) ? static_cast<uint64_t>(static_cast<int64_t>(low)) : 0;
  return is_signed(type) ? static_cast<uint64_t>(static_cast<int64_t>(rounded)) : static_cast<uint64_t>(rounded);
}

float to_f32(double x, Rounding rounding) {
  auto nearest = static_cast<float>(x);
  if (rounding == Rounding::nearest_even || std::isnan(x) || static_cast<double>(nearest) == x) return nearest;
  bool up = rounding == Rounding::up || (rounding == Rounding::zero && x < 0);
  if (up) return static_cast<double>(nearest) < x ? std::nextafterf(nearest, INFINITY) : nearest;
  return static_cast<double>(nearest) > x ? std::nextafterf(nearest, -INFINITY) : nearest;
}

uint64_t float_result(double x, Type type, const Mode& mode) {
  if (mode.relu && x < 0) x = 0;
  if (mode.saturate) x = std::isnan(x) ? 0.0 : std::fmin(std::fmax(x, 0.0), 1.0);
  switch (type) {
    case Type::f16: return to_f16(x, mode.rounding);
    case Type::bf16: return to_bf16(x, mode.rounding);
    case Type::f32: {
      float value = std::isnan(x) ? as_float(0x7fffffffu) : to_f32(x, mode.rounding);
      if (mode.flush && std::fabs(value) < 1.17549435e-38f) value = std::copysign(0.0f, value);
      return as_bits(value);
    }
    default: {
      uint64_t bits;
      std::memcpy(&bits, &x, 8);
      return bits;
    }
  }
}

Status convert(Warp& warp, const Instruction& in, uint32_t mask) {
  Mode mode = mode_of(in);
  Type to = in.type2, from = in.type;
  each_lane(warp, mask, [&](int lane) {
    uint64_t bits = warp.bits(in.args[1], lane), out;
    if (!is_float(from)) {
      __int128 value = integer_source(bits, from);
      if (is_float(to)) {
        // Through a long double: exact for every 64-bit integer, so that there is one rounding.
        auto exact = static_cast<long double>(value);
        if (to == Type::f32 && mode.rounding == Rounding::nearest_even) {
          out = as_bits(static_cast<float>(exact));
        } else {
          out = float_result(static_cast<double>(exact), to, mode);
        }
      } else {
        if (mode.saturate) {
          int width = 8 * size_of(to);
          __int128 low = is_signed(to) ? -(__int128{1} << (width - 1)) : 0;
          __int128 high = (__int128{1} << (is_signed(to) ? width - 1 : width)) - 1;
          value = value < low ? low : value > high ? high : value;
        }
        // A register wider than the type holds the value extended as the type says.
        out = static_cast<uint64_t>(integer_source(static_cast<uint64_t>(value), to));
      }
    } else {
      double value = float_source(bits, from);
      if (mode.flush && from == Type::f32 && std::fabs(value) < 1.17549435e-38) value = std::copysign(0.0, value);
      if (is_float(to)) {
        if (mode.integral) value = round_to_integer(value, mode.rounding);
        out = float_result(value, to, mode);
      } else {
        out = to_integer(value, to, from, mode.rounding);
      }
    }
    warp.put_bits(in.args[0], lane, out);
  });
  return Status::next;
}

// The common conversions, on all lanes at once.
template <class To, class From>
struct Plain {
  To operator()(From x) const { return static_cast<To>(x); }
};
struct FloatToBrain {
  uint16_t operator()(float x) const { return to_bf16(x); }
};
struct TwoFloatsToBrain {
  uint32_t operator()(float high, float low) const { return uint32_t{to_bf16(high)} << 16 | to_bf16(low); }
};
struct TwoFloatsToHalf {
  uint32_t operator()(float high, float low) const { return uint32_t{to_f16(high)} << 16 | to_f16(low); }
};

/// Two f32 to a pair in one register: the first source becomes the upper half.
Status convert_pair(Warp& warp, const Instruction& in, uint32_t mask) {
  Mode mode = mode_of(in);
  const float *high = warp.in<float>(in.args[1]), *low = warp.in<float>(in.args[2]);
  each_lane(warp, mask, [&](int lane) {
    auto one = [&](double x) -> uint64_t {
      if (mode.relu && x < 0) x = 0;
      switch (in.type2) {
        case Type::e4m3x2: return to_e4m3(x);
        case Type::e5m2x2: return to_e5m2(x);
        case Type::f16x2: return to_f16(x, mode.rounding);
        default: return to_bf16(x, mode.rounding);
      }
    };
    unsigned half = in.type2 == Type::e4m3x2 || in.type2 == Type::e5m2x2 ? 8 : 16;
    warp.put_bits(in.args[0], lane, one(high[lane]) << half | one(low[lane]));
  });
  return Status::next;
}

/// A pair of 8-bit floats to f16x2, and f16x2 to a pair of 8-bit floats.
Status convert_packed(Warp& warp, const Instruction& in, uint32_t mask) {
  Mode mode = mode_of(in);
  each_lane(warp, mask, [&](int lane) {
    auto bits = static_cast<uint32_t>(warp.bits(in.args[1], lane));
    uint32_t out = 0;
    for (unsigned h = 0; h < 2; ++h) {
      if (in.type2 == Type::f16x2) {
        auto byte = static_cast<uint8_t>(bits >> (8 * h));
        float value = in.type == Type::e4m3x2 ? from_e4m3(byte) : from_e5m2(byte);
        if (mode.relu && value < 0) value = 0;
        out |= uint32_t{to_f16(value)} << (16 * h);
      } else {
        float value = from_f16(static_cast<uint16_t>(bits >> (16 * h)));
        if (mode.relu && value < 0) value = 0;
        out |= uint32_t{in.type2 == Type::e4m3x2 ? to_e4m3(value) : to_e5m2(value)} << (8 * h);
      }
    }
    warp.put_bits(in.args[0], lane, out);
  });
  return Status::next;
}

/// cvt.rna.tf32.f32: ties away from zero, 10 mantissa bits; and .rn.
Status convert_tf32(Warp& warp, const Instruction& in, uint32_t mask) {
  uint32_t result[kWarpSize];
  for (int i = 0; i < kWarpSize; ++i) {
    uint32_t bits = warp.in<uint32_t>(in.args[1])[i];
    uint32_t half = in.detail[2] ? 0x1000u : 0x0fffu + (bits >> 13 & 1);
    result[i] = (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + half) & ~0x1fffu;
  }
  warp.put(in.args[0], mask, result);
  return Status::next;
}

void decode_cvt(Instruction& in) {
  Type to = in.type2, from = in.type;
  bool eights = to == Type::e4m3x2 || to == Type::e5m2x2;  // these saturate, and all say so
  if (to == Type::none || in.has("satfinite") != eights) return;
  bool integral = false;
  Rounding rounding = is_float(to) ? Rounding::nearest_even : Rounding::zero;
  struct Named {
    const char* name;
    Rounding rounding;
    bool integral;
  };
  static constexpr Named kModes[] = {{"rn", Rounding::nearest_even, false},
                                     {"rz", Rounding::zero, false},
                                     {"rm", Rounding::down, false},
                                     {"rp", Rounding::up, false},
                                     {"rna", Rounding::nearest_away, false},
                                     {"rni", Rounding::nearest_even, true},
                                     {"rzi", Rounding::zero, true},
                                     {"rmi", Rounding::down, true},
                                     {"rpi", Rounding::up, true}};
  bool named = false;
  for (const Named& mode : kModes)
    if (in.has(mode.name)) {
      rounding = mode.rounding;
      integral = mode.integral;
      named = true;
    }
  bool flush = in.has("ftz"), saturate = in.has("sat"), relu = in.has("relu");
  in.detail[0] = static_cast<int>(rounding);
  in.detail[1] = integral | flush << 1 | saturate << 2 | relu << 3;
  bool plain = !integral && !flush && !saturate && !relu && rounding == Rounding::nearest_even;

  bool pair = to == Type::f16x2 || to == Type::bf16x2;
  if ((pair || eights || to == Type::tf32) && (flush || saturate || integral)) return;
  if (eights && rounding != Rounding::nearest_even) return;
  if (to == Type::tf32) {
    in.detail[2] = in.has("rna");
    if (relu || !(in.has("rna") || in.has("rn"))) return;
    expect_sizes(in, {4, 4});
    in.run = convert_tf32;
    return;
  }
  if (eights) {
    if (from == Type::f32) {
      expect_count(in, 3, 3);
      expect_sizes(in, {2, 4, 4});
      in.run = convert_pair;
    } else if (from == Type::f16x2) {
      expect_sizes(in, {2, 4});
      in.run = convert_packed;
    }
    return;
  }
  if (pair) {
    if (from == Type::f32) {
      expect_count(in, 3, 3);
      if (plain && to == Type::bf16x2) return lanewise<TwoFloatsToBrain, uint32_t, float, float>(in);
      if (plain) return lanewise<TwoFloatsToHalf, uint32_t, float, float>(in);
      expect_sizes(in, {4, 4, 4});
      in.run = convert_pair;
    } else if (to == Type::f16x2 && (from == Type::e4m3x2 || from == Type::e5m2x2)) {
      expect_sizes(in, {4, 2});
      in.run = convert_packed;
    }
    return;
  }
  auto single = [](Type t) { return size_of(t) > 0 && t != Type::f32x2 && size_of(t) <= 8 && t < Type::e4m3; };
  if (!single(to) || !single(from)) return;
  expect_count(in, 2, 2);
  in.run = convert;
  auto sized = [&](int a, int b) {
    return in.args[0].is_register() && size_of(in.args[0].type) == a &&
           (!in.args[1].is_register() || size_of(in.args[1].type) == b);
  };
  if (saturate || relu) return;
  if (to == Type::bf16 && from == Type::f32 && plain && sized(2, 4)) lanewise<FloatToBrain, uint16_t, float>(in);
  if (!named && sized(8, 4) && from == Type::u32 && size_of(to) == 8 && !is_float(to))
    lanewise<Plain<uint64_t, uint32_t>, uint64_t, uint32_t>(in);
  if (!named && sized(8, 4) && from == Type::s32 && size_of(to) == 8 && !is_float(to))
    lanewise<Plain<int64_t, int32_t>, int64_t, int32_t>(in);
  if (!named && sized(4, 8) && size_of(to) == 4 && !is_float(to) && !is_float(from))
    lanewise<Plain<uint32_t, uint64_t>, uint32_t, uint64_t>(in);
  if (to == Type::f32 && from == Type::s32 && plain && sized(4, 4)) lanewise<Plain<float, int32_t>, float, int32_t>(in);
  if (to == Type::f32 && from == Type::u32 && plain && sized(4, 4))
    lanewise<Plain<float, uint32_t>, float, uint32_t>(in);
}

}  // namespace

std::vector<Opcode> convert_opcodes() {
  return {{"cvt", "Data Movement and Conversion: cvt", decode_cvt,
           "rn rz rm rp rna rni rzi rmi rpi ftz sat relu satfinite"}};
}

}  // namespace gnaforge::emulator
