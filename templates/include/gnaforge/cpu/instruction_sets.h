// The instruction sets that a kernel's body is compiled for, each in a namespace of its own, and the best one that the
// machine has. A kernel.h includes everything that its body uses before it switches the target: an inline function
// compiled for AVX-512 may be the copy that the linker keeps for all. Then, for each set:
//   #define GNAFORGE_ISA avx2
//   #define GNAFORGE_VECTOR_BYTES 32
//   GNAFORGE_BEGIN_AVX2
//   #include its isa.h
//   GNAFORGE_END_TARGET
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#define GNAFORGE_BEGIN_AVX2 \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,fma,f16c\"))), apply_to = function)")
#define GNAFORGE_BEGIN_AVX512                                                                                \
  _Pragma(                                                                                                   \
      "clang attribute push(__attribute__((target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c\"))), " \
      "apply_to = function)")
#define GNAFORGE_END_TARGET _Pragma("clang attribute pop")
#else
#define GNAFORGE_BEGIN_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c\")")
#define GNAFORGE_BEGIN_AVX512 \
  _Pragma("GCC push_options") _Pragma("GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c\")")
#define GNAFORGE_END_TARGET _Pragma("GCC pop_options")
#endif
#endif

namespace gnaforge::cpu {

enum class Isa { portable, avx2, avx512 };

// block_rows and block_channels: accumulators of the products, as many as registers take.
namespace portable {
#if defined(__aarch64__)
constexpr int block_rows = 8, block_channels = 8;
#else
constexpr int block_rows = 6, block_channels = 4;
#endif
}  // namespace portable
namespace avx2 {
constexpr int block_rows = 6, block_channels = 4;
}
namespace avx512 {
constexpr int block_rows = 8, block_channels = 8;
}

/// The best instruction set of this machine, or a lower one that GNAFORGE_CPU_ISA names.
inline Isa choose_isa() {
  Isa best = Isa::portable;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      best = Isa::avx512;
  }
#endif
  const char* wanted = std::getenv("GNAFORGE_CPU_ISA");
  if (wanted != nullptr && std::strcmp(wanted, "portable") == 0) return Isa::portable;
  if (wanted != nullptr && std::strcmp(wanted, "avx2") == 0) return std::min(best, Isa::avx2);
  return best;
}

}  // namespace gnaforge::cpu
