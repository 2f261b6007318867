// Two floats in one pair of registers, for packed instructions of sm_100 (PTX ISA, f32x2). Device only.
#pragma once

#include <cstdint>

namespace gnaforge::ptx {

using Pair = std::uint64_t;

__device__ __forceinline__ Pair make_pair(float a, float b) {
  Pair pair;
  asm("mov.b64 %0, {%1, %2};" : "=l"(pair) : "f"(a), "f"(b));
  return pair;
}

__device__ __forceinline__ Pair make_pair(float both) { return make_pair(both, both); }

__device__ __forceinline__ void split_pair(Pair pair, float& a, float& b) {
  asm("mov.b64 {%0, %1}, %2;" : "=f"(a), "=f"(b) : "l"(pair));
}

__device__ __forceinline__ Pair add(Pair a, Pair b) {
  Pair sum;
  asm("add.rn.ftz.f32x2 %0, %1, %2;" : "=l"(sum) : "l"(a), "l"(b));
  return sum;
}

/// a b + c
__device__ __forceinline__ Pair multiply_add(Pair a, Pair b, Pair c) {
  Pair result;
  asm("fma.rn.ftz.f32x2 %0, %1, %2, %3;" : "=l"(result) : "l"(a), "l"(b), "l"(c));
  return result;
}

/// The largest of three; a NaN if one is.
__device__ __forceinline__ float max_or_nan(float a, float b, float c) {
  float largest;
  asm("max.ftz.NaN.f32 %0, %1, %2, %3;" : "=f"(largest) : "f"(a), "f"(b), "f"(c));
  return largest;
}

}  // namespace gnaforge::ptx
