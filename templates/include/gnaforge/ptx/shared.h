// Shared memory by its own addresses, and its order with asynchronous copies. Device only.
#pragma once

#include <cstdint>

namespace gnaforge::ptx {

using SharedAddress = std::uint32_t;

__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void store_shared(SharedAddress to, int a, int b, int c, int d) {
  asm volatile("st.shared.v4.s32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

__device__ __forceinline__ int4 load_shared(SharedAddress from) {
  int4 found;
  asm volatile("ld.shared.v4.s32 {%0, %1, %2, %3}, [%4];"
               : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
               : "r"(from)
               : "memory");
  return found;
}

__device__ __forceinline__ void store_shared_word(SharedAddress to, unsigned word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
}

__device__ __forceinline__ void load_shared_words(unsigned (&found)[1], SharedAddress from) {
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(found[0]) : "r"(from) : "memory");
}

__device__ __forceinline__ void load_shared_words(unsigned (&found)[2], SharedAddress from) {
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(found[0]), "=r"(found[1]) : "r"(from) : "memory");
}

/// Orders this thread's writes to shared memory before asynchronous reads of it.
__device__ __forceinline__ void fence_shared_to_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/// Stores 8x8 matrices of 16-bit elements that lie in the registers of a warp; each lane has the address of one row.
__device__ __forceinline__ void store_matrices(SharedAddress to, std::uint32_t a, std::uint32_t b, std::uint32_t c,
                                               std::uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

__device__ __forceinline__ void store_matrices(SharedAddress to, std::uint32_t a, std::uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(a), "r"(b) : "memory");
}

/// And loads them.
__device__ __forceinline__ void load_matrices(std::uint32_t (&found)[4], SharedAddress from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(found[0]), "=r"(found[1]), "=r"(found[2]), "=r"(found[3])
               : "r"(from)
               : "memory");
}

__device__ __forceinline__ void load_matrices(std::uint32_t (&found)[2], SharedAddress from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(found[0]), "=r"(found[1])
               : "r"(from)
               : "memory");
}

}  // namespace gnaforge::ptx
