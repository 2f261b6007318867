// Products of tiles in shared memory, as one commit group each. Device only.
#pragma once

#include "gnaforge/gpu/shared_memory.h"
#include "gnaforge/ptx/wgmma.h"
#include "gnaforge/sm90/forward/layout.h"

namespace gnaforge::sm90::backward {

/// Issues c = A B^T over `Channels` channels: A has 64 rows, B one for each column of c; both lie in chunks of channels
/// that are so many bytes apart. `Mma::scores` is one wgmma of it.
template <class L, class Mma, int Channels, int N>
__device__ __forceinline__ void multiply_shared(float (&c)[N], ptx::SharedAddress a, int a_chunk_bytes,
                                                ptx::SharedAddress b, int b_chunk_bytes) {
  asm volatile("" : "+r"(a));  // worked out anew: else each step's descriptor takes a register all the time
  const std::uint64_t left = ptx::descriptor(a, 16), right = ptx::descriptor(b, 16);
  ptx::hold(c);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < ceil_div(Channels, L::mma_depth); ++step) {
    const int chunk = step * mma_bytes / row_bytes, within = step * mma_bytes % row_bytes;
    Mma::scores(c, left + (chunk * a_chunk_bytes + within) / 16, right + (chunk * b_chunk_bytes + within) / 16,
                step > 0);
  }
  ptx::wgmma_commit();
  ptx::hold(c);
}

/// Issues c += A B: A in registers, 64 x `Rows`, rounded; B in shared memory, `Rows` rows of channels in chunks.
/// `multiply(c, a, b)` is one wgmma of it.
template <class L, int Rows, int N, int M, class Multiply>
__device__ __forceinline__ void multiply_registers(float (&c)[N], std::uint32_t (&a)[M], ptx::SharedAddress b,
                                                   int b_chunk_bytes, const Multiply& multiply) {
  const std::uint64_t right = ptx::descriptor(b, b_chunk_bytes);
  ptx::hold(a);
  ptx::hold(c);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < Rows / L::mma_depth; ++step)
    multiply(c, a + 4 * step, right + step * L::mma_depth * row_bytes / 16);
  ptx::wgmma_commit();
  ptx::hold(c);
  ptx::hold(a);
}

}  // namespace gnaforge::sm90::backward
