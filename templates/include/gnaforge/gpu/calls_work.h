// What a producer takes to know of a launch whose slices may be of several calls: see calls_params.h. Device only.
#pragma once

#include "gnaforge/gpu/calls_params.h"
#include "gnaforge/gpu/work.h"
#include "gnaforge/ptx/mbarrier.h"
#include "gnaforge/ptx/registers.h"
#include "gnaforge/ptx/tma.h"

namespace gnaforge::gpu {

/// A Q tile whose heads are counted among those of its slice's maps.
template <class QTile>
struct CallsPlace : Place<QTile> {
  template <class Params>
  __device__ __forceinline__ CallsPlace(const Params& params, int index) : Place<QTile>(params, index) {
    this->head += params.slices[this->slice].first_head;
    this->kv_head += params.slices[this->slice].first_kv_head;
  }
};

/// The extra keys that a Q tile sees, in tiles of `L::columns`. `Params` is a CallsParams.
template <class L, class Params, class QTile>
struct ExtraKeys {
  const Params& params;
  const CallsPlace<QTile>& work;

  /// How many keys of a piece count for the batch entry.
  __device__ __forceinline__ int length(int piece) const {
    const auto& call = params.call(work.slice);
    const int tokens = call.extra_tokens[piece];
    const int* const lengths = call.extra_lengths[piece];
    if (lengths == nullptr) return tokens;
    const std::int64_t batch = params.slices[work.slice].first_batch + work.batch;
    return clamp_int(ptx::load_word(lengths + batch * call.extra_lengths_stride[piece]), 0, tokens);
  }

  __device__ __forceinline__ int tiles() const {
    int tiles = 0;
#pragma unroll 1
    for (int piece = 0; piece < params.call(work.slice).extra_pieces; ++piece)
      tiles += (length(piece) + L::columns - 1) / L::columns;
    return tiles;
  }

  /// Loads all chunks of the tile from key `first` on. `bit` is that of CallParams::repeated.
  template <int Chunks>
  __device__ __forceinline__ void load(int bit, const CUtensorMap& map, ptx::SharedAddress barrier,
                                       ptx::SharedAddress to, int first) const {
    const bool repeated = params.call(work.slice).repeated >> bit & 1;
    const int batch = repeated ? 0 : params.slices[work.slice].first_batch + work.batch;
    ptx::mbarrier_arrive_expect(barrier, Chunks * L::kv_chunk_bytes);
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      const int at[4] = {c * L::chunk_channels, work.kv_head, first, batch};
      ptx::tensor_load(to + c * L::kv_chunk_bytes, &map, barrier, at);
    }
  }
};

}  // namespace gnaforge::gpu
