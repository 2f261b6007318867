// What holds an element of a dtype in memory; arithmetic is in float. A dtype that isn't here doesn't compile.
// Host only.
#pragma once

#include <cstdint>

#include "gnaforge/abi.h"

namespace gnaforge::cpu {

struct Bf16 {
  std::uint16_t bits;
};
struct Fp16 {
  std::uint16_t bits;
};

template <gnaforge_dtype Dtype>
constexpr bool is_known = false;

template <gnaforge_dtype Dtype>
struct ElementOf {
  static_assert(is_known<Dtype>, "no cpu kernel takes this dtype: cpu/element.h has fp32, bf16 and fp16");
};
template <>
struct ElementOf<GNAFORGE_FP32> {
  using type = float;
};
template <>
struct ElementOf<GNAFORGE_BF16> {
  using type = Bf16;
};
template <>
struct ElementOf<GNAFORGE_FP16> {
  using type = Fp16;
};

}  // namespace gnaforge::cpu
