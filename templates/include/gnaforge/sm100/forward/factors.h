// What the kernels know of the dtype of their inputs, and of probabilities, which meet V in it. Host and device.
#pragma once

#include <cstdint>

#include "gnaforge/abi.h"

namespace gnaforge::sm100 {

/// Probabilities of 16 bits are 1 where a score is the shift, and up to 2^growth: a shift moves only where a score
/// exceeds it by more, so few tiles rescale.
struct SixteenBitFactors {
  static constexpr float growth = 8.0f;
  static constexpr int p_exponent = 0;   ///< Probabilities are multiplied by 2 to this, and so are their sums.
  static constexpr bool scaled = false;  ///< Whether calls may have descales.
};

template <gnaforge_dtype Dtype>
struct Factors;

template <>
struct Factors<GNAFORGE_FP16> : SixteenBitFactors {
  static constexpr std::uint32_t code = 0;  ///< In the instruction descriptor of a product.
};

template <>
struct Factors<GNAFORGE_BF16> : SixteenBitFactors {
  static constexpr std::uint32_t code = 1;
};

/// e4m3 reaches from 2^-9 to 448: probabilities of up to 2^8.75 use that, and are rounded to no more than 448.
template <>
struct Factors<GNAFORGE_E4M3> {
  static constexpr std::uint32_t code = 0;
  static constexpr float growth = 0.75f;
  static constexpr int p_exponent = 8;
  static constexpr bool scaled = true;
};

}  // namespace gnaforge::sm100
