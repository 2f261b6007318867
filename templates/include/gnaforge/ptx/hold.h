// Keeps the compiler from moving accesses to registers across a point. Device only.
#pragma once

#include <cstdint>

namespace gnaforge::ptx {

template <int N>
__device__ __forceinline__ void hold(float (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int N>
__device__ __forceinline__ void hold(std::uint32_t (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

/// The number, of which the compiler doesn't know that it is the same: what follows from it is worked out from here on
/// and not long before, where it would take registers.
__device__ __forceinline__ std::uint32_t anew(std::uint32_t number) {
  asm volatile("" : "+r"(number));
  return number;
}

}  // namespace gnaforge::ptx
