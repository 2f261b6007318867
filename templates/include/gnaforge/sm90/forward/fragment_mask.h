// Masks of shell tiles in the layout of wgmma's accumulator. Device only.
#pragma once

#include "gnaforge/gpu/work.h"
#include "gnaforge/ptx/registers.h"
#include "gnaforge/sm90/forward/layout.h"
#include "gnaforge/sm90/forward/softmax.h"

namespace gnaforge::sm90 {

/// What a warp's 16 rows see. Lane i holds it of row i % 16, found once per Q tile.
template <class Config>
struct RowWindows {
  using Source = TileSource<Config>;
  using QTile = typename Config::QTile;
  using KvTile = typename Config::KvTile;
  static constexpr int rank = QTile::rank;

  Interval row[rank];

  /// `first_row` is the warp's, within the Q tile. Rows of tokens that don't exist get the last one's windows; nobody
  /// stores them.
  __device__ __forceinline__ void compute(const gpu::Params<rank>& params, const gpu::QTileFacts<rank>& work,
                                          int first_row) {
    const int own = first_row + ptx::reload_thread_index() % 16;
#pragma unroll
    for (int d = 0; d < rank; ++d) {
      const Axis axis = params.axis_of(work.slice, d);
      const int query = work.q_begin[d] + own / QTile::pitch(d) % QTile::extent(d);
      row[d] = Source::row(axis, min_int(query, axis.length - 1));
    }
  }

  /// Sets scores of keys that a row doesn't see to -infinity; `origin` is the KV tile's first key.
  template <int N>
  __device__ __forceinline__ void apply(float (&scores)[N], const gpu::Params<rank>& params,
                                        const int (&origin)[rank]) const {
    static_assert(N == KvTile::volume / 2, "one accumulator per tile");
    const int lane = threadIdx.x % 32;
    Interval own[rank];
#pragma unroll
    for (int d = 0; d < rank; ++d) own[d] = Source::seen(params.axis[d], row[d], origin[d]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      Interval seen[rank];
#pragma unroll
      for (int d = 0; d < rank; ++d)
        seen[d] = {__shfl_sync(~0u, own[d].begin, lane / 4 + 8 * r), __shfl_sync(~0u, own[d].end, lane / 4 + 8 * r)};
      const RowMask<KvTile> mask = Source::mask(seen);
#pragma unroll
      for (int word = 0; word < ceil_div(KvTile::volume, 32); ++word) {
        const unsigned bits = mask.word(word) >> (2 * (lane % 4));
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int index = element(4 * word + i, r, c);
            if (index < N && !(bits >> (8 * i + c) & 1)) scores[index] = -INFINITY;
          }
      }
    }
  }
};

}  // namespace gnaforge::sm90
