// wgmma of sm_90a, but for the products: these depend on the tile and are rendered into each kernel. Device only.
#pragma once

#include <cstdint>

#include "gnaforge/ptx/hold.h"
#include "gnaforge/ptx/shared.h"

namespace gnaforge::ptx {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

/// Descriptor of a matrix of 16-bit elements in rows of 128 bytes, swizzled over 128 bytes. `leading` is the distance
/// in bytes of column blocks of 64 where columns are contiguous along N (unused where along K); groups of 8 rows are
/// 1024 bytes apart. Adding bytes / 16 moves the start.
__device__ __forceinline__ std::uint64_t descriptor(SharedAddress start, int leading) {
  constexpr std::uint64_t swizzle_128 = std::uint64_t{1} << 62;
  constexpr std::uint64_t stride = std::uint64_t{1024 >> 4} << 32;
  return swizzle_128 | stride | std::uint64_t{static_cast<std::uint32_t>(leading) >> 4} << 16 |
         std::uint64_t{(start & 0x3ffff) >> 4};
}

}  // namespace gnaforge::ptx
