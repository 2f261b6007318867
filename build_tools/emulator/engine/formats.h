// Small floating-point formats, as bits.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace gnaforge::emulator {

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float from_bf16(uint16_t bits) { return as_float(uint32_t{bits} << 16); }

/// Round to nearest even; NaN becomes the canonical 0x7fff.
inline uint16_t to_bf16(float value) {
  uint32_t bits = as_bits(value);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : rounded);
}

/// Decodes a format with `E` exponent and `M` mantissa bits and subnormals; infinities and NaN as in IEEE 754.
template <int E, int M>
float decode_ieee(uint32_t bits) {
  constexpr int kBias = (1 << (E - 1)) - 1;
  uint32_t mantissa = bits & ((1u << M) - 1), exponent = bits >> M & ((1u << E) - 1);
  float sign = bits >> (E + M) & 1 ? -1.0f : 1.0f;
  if (exponent == (1u << E) - 1) return mantissa ? as_float(0x7fffffffu) : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), 1 - kBias - M);
  return sign * std::ldexp(static_cast<float>(mantissa | 1u << M), static_cast<int>(exponent) - kBias - M);
}

enum class Rounding : uint8_t { nearest_even, zero, down, up, nearest_away };

/// Rounds to an integer value.
inline double round_to_integer(double x, Rounding mode) {
  switch (mode) {
    case Rounding::zero: return std::trunc(x);
    case Rounding::down: return std::floor(x);
    case Rounding::up: return std::ceil(x);
    case Rounding::nearest_away: return std::round(x);
    default: return std::nearbyint(x);
  }
}

/// Rounds |x| to a format of `E` and `M` bits; the result may be one step beyond the largest finite value.
template <int E, int M>
uint32_t encode_magnitude(double x, Rounding mode, bool negative) {
  constexpr int kBias = (1 << (E - 1)) - 1;
  if (x == 0) return 0;
  int exponent = std::ilogb(x);
  if (exponent < 1 - kBias) exponent = 1 - kBias;
  if (negative && mode == Rounding::down) {
    mode = Rounding::up;
  } else if (negative && mode == Rounding::up) {
    mode = Rounding::down;
  }
  double steps = round_to_integer(std::ldexp(x, M - exponent), mode);
  // Subnormals share the least exponent: steps below 2^M need no implicit bit.
  auto mantissa = static_cast<uint64_t>(steps);
  uint64_t biased = mantissa >= (uint64_t{1} << M) ? static_cast<uint64_t>(exponent + kBias) : 0;
  uint64_t bits = biased ? (biased << M) + (mantissa - (uint64_t{1} << M)) : mantissa;
  return bits > 0xffffffffu ? 0xffffffffu : static_cast<uint32_t>(bits);
}

inline float from_f16(uint16_t bits) { return decode_ieee<5, 10>(bits); }
inline uint16_t to_f16(double value, Rounding mode = Rounding::nearest_even) {
  uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7fff;
  if (std::isinf(value)) return sign | 0x7c00;
  uint32_t bits = encode_magnitude<5, 10>(std::fabs(value), mode, sign != 0);
  bool away = mode == Rounding::nearest_even || mode == Rounding::nearest_away || (mode == Rounding::up && !sign) ||
              (mode == Rounding::down && sign);
  if (bits >= 0x7c00) bits = away ? 0x7c00 : 0x7bff;
  return static_cast<uint16_t>(sign | bits);
}
inline uint16_t to_bf16(double value, Rounding mode) {
  uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7fff;
  if (std::isinf(value)) return sign | 0x7f80;
  uint32_t bits = encode_magnitude<8, 7>(std::fabs(value), mode, sign != 0);
  bool away = mode == Rounding::nearest_even || (mode == Rounding::up && !sign) || (mode == Rounding::down && sign);
  if (bits >= 0x7f80) bits = away ? 0x7f80 : 0x7f7f;
  return static_cast<uint16_t>(sign | bits);
}

// e4m3 has no infinity, one NaN pattern per sign, and 448 as its largest value; e5m2 is IEEE-like.
inline float from_e4m3(uint8_t bits) {
  if ((bits & 0x7f) == 0x7f) return as_float(0x7fffffffu);
  uint32_t mantissa = bits & 7u, exponent = bits >> 3 & 15u;
  float magnitude = exponent ? std::ldexp(static_cast<float>(mantissa | 8u), static_cast<int>(exponent) - 10)
                             : std::ldexp(static_cast<float>(mantissa), -9);
  return bits & 0x80 ? -magnitude : magnitude;
}
inline float from_e5m2(uint8_t bits) { return decode_ieee<5, 2>(bits); }
/// With .satfinite, as every conversion to these formats has it.
inline uint8_t to_e4m3(double value) {
  if (std::isnan(value)) return 0x7f;
  uint8_t sign = std::signbit(value) ? 0x80 : 0;
  uint32_t bits =
      std::fabs(value) > 464 ? 0x7e : encode_magnitude<4, 3>(std::fabs(value), Rounding::nearest_even, false);
  return static_cast<uint8_t>(sign | (bits > 0x7e ? 0x7e : bits));
}
inline uint8_t to_e5m2(double value) {
  if (std::isnan(value)) return 0x7f;
  uint8_t sign = std::signbit(value) ? 0x80 : 0;
  uint32_t bits = std::isinf(value) ? 0x7b : encode_magnitude<5, 2>(std::fabs(value), Rounding::nearest_even, false);
  return static_cast<uint8_t>(sign | (bits > 0x7b ? 0x7b : bits));
}

}  // namespace gnaforge::emulator
