// Tensor copies of boxes, which lie in shared memory in chunks of channels; see shared_memory.h. Device only.
#pragma once

#include "gnaforge/gpu/shared_memory.h"
#include "gnaforge/gpu/work.h"
#include "gnaforge/ptx/tma.h"

namespace gnaforge::gpu {

/// Loads `Chunks` chunks of a box of tokens, `chunk_bytes` apart from `to` on. What is beyond the tensor's channels
/// reads zero. `barrier` hears of the bytes.
template <class L, int Chunks>
__device__ __forceinline__ void load_box(const CUtensorMap& map, bool folded, ptx::SharedAddress barrier,
                                         ptx::SharedAddress to, int chunk_bytes, int head_dim, int head,
                                         const int (&token)[L::rank], int batch) {
#pragma unroll
  for (int c = 0; c < Chunks; ++c) {
    int at[map_rank(L::rank)];
    map_coordinates<L::rank>(at, folded, head_dim, c * L::chunk_channels, head, token, batch);
    ptx::tensor_load(to + c * chunk_bytes, &map, barrier, at);
  }
}

/// Stores a box likewise; the copy clips at the tensor's borders.
template <class L, int Chunks>
__device__ __forceinline__ void store_box(const CUtensorMap& map, bool folded, ptx::SharedAddress from, int chunk_bytes,
                                          int head_dim, int head, const int (&token)[L::rank], int batch) {
#pragma unroll
  for (int c = 0; c < Chunks; ++c) {
    int at[map_rank(L::rank)];
    map_coordinates<L::rank>(at, folded, head_dim, c * L::chunk_channels, head, token, batch);
    ptx::tensor_store(&map, from + c * chunk_bytes, at);
  }
}

/// Clears rows of `blocks` blocks of `Rows` from row `first` on: products read whole tiles, and nobody writes the rows
/// that boxes lack.
template <int Threads, int Rows>
__device__ __forceinline__ void clear_rows(unsigned char* memory, int blocks, int first) {
  const int pieces = (Rows - first) * row_bytes / 16;
  for (int i = threadIdx.x; i < blocks * pieces; i += Threads)
    reinterpret_cast<uint4*>(memory + i / pieces * Rows * row_bytes + first * row_bytes)[i % pieces] =
        uint4{0, 0, 0, 0};
}

}  // namespace gnaforge::gpu
