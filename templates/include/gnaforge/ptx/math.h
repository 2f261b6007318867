// Arithmetic on floats that C++ has no words for. Device only.
#pragma once

#include <cstdint>

namespace gnaforge::ptx {

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Two numbers rounded to 16 bits each, `low` in the low half.
__device__ __forceinline__ std::uint32_t pack_bf16(float low, float high) {
  std::uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

__device__ __forceinline__ std::uint32_t pack_fp16(float low, float high) {
  std::uint32_t both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

/// Four numbers rounded to e4m3, `a` in the lowest byte; those beyond 448 become 448.
__device__ __forceinline__ std::uint32_t pack_e4m3(float a, float b, float c, float d) {
  std::uint32_t all;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n"
      "}"
      : "=r"(all)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return all;
}

/// Of pack_bf16 and pack_fp16 the reverse.
__device__ __forceinline__ float2 unpack_bf16(std::uint32_t both) {
  return {__uint_as_float(both << 16), __uint_as_float(both & 0xFFFF0000u)};
}

__device__ __forceinline__ float2 unpack_fp16(std::uint32_t both) {
  float2 found;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.f32.f16 %0, low;\n"
      "cvt.f32.f16 %1, high;\n"
      "}"
      : "=f"(found.x), "=f"(found.y)
      : "r"(both));
  return found;
}

}  // namespace gnaforge::ptx
