// Extra keys in tiles, as a producer loads them. Device only.
#pragma once

#include "gnaforge/gpu/extra_keys.h"
#include "gnaforge/gpu/work.h"
#include "gnaforge/ptx/mbarrier.h"
#include "gnaforge/ptx/registers.h"
#include "gnaforge/ptx/tma.h"

namespace gnaforge::gpu {

/// How many keys of a piece count for a batch entry of a call.
__device__ __forceinline__ int extra_length(const ExtraKeys& keys, int piece, std::int64_t batch) {
  const int tokens = keys.tokens[piece];
  const int* const lengths = keys.lengths[piece];
  if (lengths == nullptr) return tokens;
  return clamp_int(ptx::load_word(lengths + batch * keys.lengths_stride[piece]), 0, tokens);
}

/// Loads `Chunks` chunks of the box of keys from `first` on, `chunk_bytes` apart from `to` on. `batch` is an entry of
/// the call's, `repeated` whether the map has one for all. `barrier` hears of the bytes.
template <class L, int Chunks>
__device__ __forceinline__ void load_extra_box(const CUtensorMap& map, bool repeated, ptx::SharedAddress barrier,
                                               ptx::SharedAddress to, int chunk_bytes, int kv_head, int first,
                                               int batch) {
#pragma unroll
  for (int c = 0; c < Chunks; ++c) {
    const int at[4] = {c * L::chunk_channels, kv_head, first, repeated ? 0 : batch};
    ptx::tensor_load(to + c * chunk_bytes, &map, barrier, at);
  }
}

/// The extra keys that a Q tile sees, in tiles of `L::columns`. `Params` has extra(slice) and first_batch(slice).
template <class L, class Params>
struct ExtraTiles {
  const Params& params;

  template <class Place>
  __device__ __forceinline__ int length(const Place& work, int piece) const {
    return extra_length(params.extra(work.slice), piece, std::int64_t{params.first_batch(work.slice)} + work.batch);
  }

  /// Of all pieces.
  template <class Place>
  __device__ __forceinline__ int tiles(const Place& work) const {
    int tiles = 0;
#pragma unroll 1
    for (int piece = 0; piece < params.extra(work.slice).pieces; ++piece)
      tiles += (length(work, piece) + L::columns - 1) / L::columns;
    return tiles;
  }

  /// Loads all chunks of the tile from key `first` on. `bit` is that of ExtraKeys::repeated.
  template <int Chunks, class Place>
  __device__ __forceinline__ void load_box(const Place& work, int bit, const CUtensorMap& map,
                                           ptx::SharedAddress barrier, ptx::SharedAddress to, int first) const {
    ptx::mbarrier_arrive_expect(barrier, Chunks * L::kv_box_bytes);
    load_extra_box<L, Chunks>(map, params.extra(work.slice).repeated >> bit & 1, barrier, to, L::kv_chunk_bytes,
                              work.kv_head, first, params.first_batch(work.slice) + work.batch);
  }
};

}  // namespace gnaforge::gpu
