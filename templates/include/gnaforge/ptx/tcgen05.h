// tcgen05 of sm_100: products whose results are in tensor memory, and how warps reach it (PTX ISA, TensorCore 5th
// Generation Instructions). Device only.
#pragma once

#include <cstdint>

#include "gnaforge/ptx/shared.h"

namespace gnaforge::ptx {

/// A column of tensor memory in its low half; the high half is a lane, of which a warp reaches 32: those of its number
/// within its warpgroup.
using TensorAddress = std::uint32_t;

/// To be called by all lanes of one warp; `to` in shared memory hears where the columns begin.
__device__ __forceinline__ void allocate_tensor_memory(SharedAddress to, int columns) {
  asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], %1;" ::"r"(to), "r"(columns) : "memory");
  asm volatile("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;");
}

/// By the same warp.
__device__ __forceinline__ void free_tensor_memory(TensorAddress address, int columns) {
  asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, %1;" ::"r"(address), "r"(columns));
}

// A lane's columns, from `from` or `to` on, to and from registers: there when the wait below returns.

__device__ __forceinline__ void load_tensor_16(TensorAddress from, float* to) {
  asm volatile(
      "tcgen05.ld.sync.aligned.32x32b.x16.b32 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, "
      "%15}, [%16];"
      : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3]), "=f"(to[4]), "=f"(to[5]), "=f"(to[6]), "=f"(to[7]),
        "=f"(to[8]), "=f"(to[9]), "=f"(to[10]), "=f"(to[11]), "=f"(to[12]), "=f"(to[13]), "=f"(to[14]), "=f"(to[15])
      : "r"(from));
}

__device__ __forceinline__ void load_tensor_32(TensorAddress from, float* to) {
  asm volatile(
      "tcgen05.ld.sync.aligned.32x32b.x32.b32 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, "
      "%15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, [%32];"
      : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3]), "=f"(to[4]), "=f"(to[5]), "=f"(to[6]), "=f"(to[7]),
        "=f"(to[8]), "=f"(to[9]), "=f"(to[10]), "=f"(to[11]), "=f"(to[12]), "=f"(to[13]), "=f"(to[14]), "=f"(to[15]),
        "=f"(to[16]), "=f"(to[17]), "=f"(to[18]), "=f"(to[19]), "=f"(to[20]), "=f"(to[21]), "=f"(to[22]), "=f"(to[23]),
        "=f"(to[24]), "=f"(to[25]), "=f"(to[26]), "=f"(to[27]), "=f"(to[28]), "=f"(to[29]), "=f"(to[30]), "=f"(to[31])
      : "r"(from));
}

__device__ __forceinline__ void store_tensor_8(TensorAddress to, const std::uint32_t* from) {
  asm volatile("tcgen05.st.sync.aligned.32x32b.x8.b32 [%0], {%1, %2, %3, %4, %5, %6, %7, %8};" ::"r"(to), "r"(from[0]),
               "r"(from[1]), "r"(from[2]), "r"(from[3]), "r"(from[4]), "r"(from[5]), "r"(from[6]), "r"(from[7])
               : "memory");
}

__device__ __forceinline__ void store_tensor_16(TensorAddress to, const std::uint32_t* from) {
  asm volatile(
      "tcgen05.st.sync.aligned.32x32b.x16.b32 [%0], {%1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, "
      "%15, %16};" ::"r"(to),
      "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3]), "r"(from[4]), "r"(from[5]), "r"(from[6]), "r"(from[7]),
      "r"(from[8]), "r"(from[9]), "r"(from[10]), "r"(from[11]), "r"(from[12]), "r"(from[13]), "r"(from[14]),
      "r"(from[15])
      : "memory");
}

__device__ __forceinline__ void wait_tensor_loads() { asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait_tensor_stores() { asm volatile("tcgen05.wait::st.sync.aligned;" ::: "memory"); }

/// Orders this thread's tcgen05 instructions before whatever tells another thread of them,
__device__ __forceinline__ void fence_tensor_before() {
  asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory");
}
/// and those that follow after what another thread has told of.
__device__ __forceinline__ void fence_tensor_after() { asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory"); }

/// Arrives at `barrier` when all products that this thread has issued are done.
__device__ __forceinline__ void commit_products(SharedAddress barrier) {
  asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(barrier) : "memory");
}

/// The lower half of the descriptor of a matrix in rows of 128 bytes, swizzled over 128 bytes. `leading` is how far
/// apart in bytes column blocks of 128 bytes are where columns are contiguous along N; groups of 8 rows are 1024 bytes
/// apart, which the upper half says, the same for all. Adding bytes / 16 moves the start.
__device__ __forceinline__ std::uint32_t matrix_descriptor(SharedAddress start, int leading) {
  return static_cast<std::uint32_t>(leading) >> 4 << 16 | (start & 0x3ffff) >> 4;
}

/// What a product is to know of its factors (PTX ISA, instruction descriptor): 128 rows by `columns`, f32 results,
/// factors of the type with this code (of 16 bits 0 for fp16, 1 for bf16; of 8 bits 0 for e4m3), the right one
/// contiguous along K or along N.
constexpr std::uint32_t product_descriptor(std::uint32_t type, int columns, bool contiguous_along_n) {
  return 1u << 4 | type << 7 | type << 10 | (contiguous_along_n ? 1u << 16 : 0u) |
         static_cast<std::uint32_t>(columns / 8) << 17 | (128u / 16) << 24;
}

/// The same with other columns.
__device__ __forceinline__ std::uint32_t with_columns(std::uint32_t product, int columns) {
  return (product & ~(63u << 17)) | static_cast<std::uint32_t>(columns / 8) << 17;
}

// c (+)= A B^T of 32 bytes of channels, in elements of `Bytes`. The kind is a word of the instruction.
#define GNAFORGE_MULTIPLY_SHARED(kind)                                \
  asm volatile(                                                       \
      "{\n"                                                           \
      ".reg .pred p;\n"                                               \
      ".reg .b64 a, b;\n"                                             \
      "setp.ne.b32 p, %4, 0;\n"                                       \
      "mov.b64 a, {%1, 0x40004040};\n"                                \
      "mov.b64 b, {%2, 0x40004040};\n"                                \
      "tcgen05.mma.cta_group::1.kind::" kind                          \
      " [%0], a, b, %3, p;\n"                                         \
      "}" ::"r"(c),                                                   \
      "r"(a), "r"(b), "r"(product), "r"(static_cast<int>(accumulate)) \
      : "memory")
#define GNAFORGE_MULTIPLY_TENSOR(kind)                                \
  asm volatile(                                                       \
      "{\n"                                                           \
      ".reg .pred p;\n"                                               \
      ".reg .b64 b;\n"                                                \
      "setp.ne.b32 p, %4, 0;\n"                                       \
      "mov.b64 b, {%2, 0x40004040};\n"                                \
      "tcgen05.mma.cta_group::1.kind::" kind                          \
      " [%0], [%1], b, %3, p;\n"                                      \
      "}" ::"r"(c),                                                   \
      "r"(a), "r"(b), "r"(product), "r"(static_cast<int>(accumulate)) \
      : "memory")

/// A and B in shared memory.
template <int Bytes>
__device__ __forceinline__ void multiply_shared(TensorAddress c, std::uint32_t a, std::uint32_t b,
                                                std::uint32_t product, bool accumulate) {
  if constexpr (Bytes == 1)
    GNAFORGE_MULTIPLY_SHARED("f8f6f4");
  else
    GNAFORGE_MULTIPLY_SHARED("f16");
}

/// A in tensor memory.
template <int Bytes>
__device__ __forceinline__ void multiply_tensor(TensorAddress c, TensorAddress a, std::uint32_t b,
                                                std::uint32_t product, bool accumulate) {
  if constexpr (Bytes == 1)
    GNAFORGE_MULTIPLY_TENSOR("f8f6f4");
  else
    GNAFORGE_MULTIPLY_TENSOR("f16");
}

#undef GNAFORGE_MULTIPLY_SHARED
#undef GNAFORGE_MULTIPLY_TENSOR

}  // namespace gnaforge::ptx
