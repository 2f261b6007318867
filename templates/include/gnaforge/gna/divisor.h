// Division by a number that is known before a kernel runs, as a product and a shift (Granlund and Montgomery, Division
// by Invariant Integers using Multiplication, 1994, theorem 4.2). Host and device, no torch, no STL.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GNAFORGE_HD __host__ __device__ __forceinline__
#else
#define GNAFORGE_HD inline
#endif

namespace gnaforge {

/// A divisor from 1 on, of dividends from 0 on; both fit an int.
struct Divisor {
  int value;
  unsigned factor;  ///< 2^(31 + shift) / value, rounded up.
  int shift;        ///< The logarithm of value, rounded up: the factor fits 32 bits.

  GNAFORGE_HD int quotient(int dividend) const {
    // Twice the dividend, so that the product's upper word is 31 bits down.
    const std::uint64_t product = std::uint64_t{factor} * (2 * static_cast<unsigned>(dividend));
    return static_cast<int>(static_cast<unsigned>(product >> 32) >> shift);
  }

  /// The quotient rounded up. Dividend and divisor together fit an int.
  GNAFORGE_HD int quotient_up(int dividend) const { return quotient(dividend + value - 1); }

  /// The largest multiple that is not above the dividend.
  GNAFORGE_HD int floor(int dividend) const { return quotient(dividend) * value; }

  /// Leaves the quotient in `number` and returns the rest.
  GNAFORGE_HD int split(int& number) const {
    const int dividend = number;
    number = quotient(dividend);
    return dividend - number * value;
  }
};

GNAFORGE_HD constexpr Divisor make_divisor(int value) {
  int shift = 0;
  while (std::int64_t{1} << shift < value) ++shift;
  const std::uint64_t below = (std::uint64_t{1} << (31 + shift)) - 1;
  return {value, static_cast<unsigned>(below / static_cast<unsigned>(value) + 1), shift};
}

/// Worked out by the compiler.
template <int Value>
GNAFORGE_HD constexpr Divisor divisor_of() {
  constexpr Divisor divisor = make_divisor(Value);
  return divisor;
}

}  // namespace gnaforge
