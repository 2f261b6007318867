// What tensor-core kernels know of a dtype. One that isn't here doesn't compile. Host and device.
#pragma once

#include <cuda.h>

#include "gnaforge/abi.h"
#include "gnaforge/ptx/math.h"

namespace gnaforge::gpu {

template <gnaforge_dtype Dtype>
constexpr bool is_known = false;

template <gnaforge_dtype Dtype>
struct Element {
  static_assert(is_known<Dtype>, "no tensor-core kernel takes this dtype: gpu/element.h has bf16, fp16 and e4m3");
};

template <>
struct Element<GNAFORGE_BF16> {
  static constexpr int bytes = 2;
  static constexpr CUtensorMapDataType map_type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  static __device__ __forceinline__ std::uint32_t pack(float low, float high) { return ptx::pack_bf16(low, high); }
  static __device__ __forceinline__ float2 unpack(std::uint32_t both) { return ptx::unpack_bf16(both); }
};

template <>
struct Element<GNAFORGE_FP16> {
  static constexpr int bytes = 2;
  static constexpr CUtensorMapDataType map_type = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  static __device__ __forceinline__ std::uint32_t pack(float low, float high) { return ptx::pack_fp16(low, high); }
  static __device__ __forceinline__ float2 unpack(std::uint32_t both) { return ptx::unpack_fp16(both); }
};

/// Of inputs only.
template <>
struct Element<GNAFORGE_E4M3> {
  static constexpr int bytes = 1;
  static constexpr CUtensorMapDataType map_type = CU_TENSOR_MAP_DATA_TYPE_UINT8;
  static __device__ __forceinline__ std::uint32_t pack(float a, float b, float c, float d) {
    return ptx::pack_e4m3(a, b, c, d);
  }
};

}  // namespace gnaforge::gpu
