// Masks of shell tiles in the layout of wgmma's accumulator. Device only.
#pragma once

#include "gnaforge/gna/mask.h"
#include "gnaforge/gpu/work.h"
#include "gnaforge/ptx/registers.h"
#include "gnaforge/sm90/forward/softmax.h"

namespace gnaforge::sm90 {

/// Windows of a warp's 16 rows. Lane i holds where those of row i % 16 begin, computed once per Q tile; where they end
/// follows without a division, which saves registers.
template <class Config>
struct RowWindows {
  using QTile = typename Config::QTile;
  using KvTile = typename Config::KvTile;
  static constexpr int rank = QTile::rank;

  int begin[rank];

  /// Position of the lane's row.
  static __device__ __forceinline__ int position(int d, int q_begin, int first_row) {
    const int row = first_row + ptx::reload_thread_index() % 16;
    return q_begin + row / QTile::pitch(d) % QTile::extent(d);
  }

  /// `first_row` is the warp's, within the Q tile. Rows of tokens that don't exist get the last one's windows; nobody
  /// stores them.
  __device__ __forceinline__ void compute(const gpu::Params<rank>& params, const gpu::TileFacts<rank>& work, int first_row) {
#pragma unroll
    for (int d = 0; d < rank; ++d) {
      const Axis axis = params.axis_of(work.slice, d);
      begin[d] = window(axis, min_int(position(d, work.q_begin[d], first_row), axis.length - 1)).begin;
    }
  }

  /// Sets scores of keys that a row doesn't see to -infinity; `origin` is the KV tile's first key.
  template <int N>
  __device__ __forceinline__ void apply(float (&scores)[N], const gpu::Params<rank>& params, ptx::SharedAddress slot,
                                        int first_row, const int (&origin)[rank]) const {
    static_assert(N == KvTile::volume / 2, "one accumulator per tile");
    const int lane = threadIdx.x % 32;
    const gpu::TileFacts<rank> work = gpu::TileFacts<rank>::load(slot);
    Interval keys[rank];
#pragma unroll
    for (int d = 0; d < rank; ++d) {
      const Axis& axis = params.axis[d];
      const int end = axis.causal ? position(d, work.q_begin[d], first_row) + 1 : begin[d] + axis.window;
      keys[d] = {begin[d] - origin[d], end - origin[d]};
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      RowMask<KvTile> mask;
#pragma unroll
      for (int d = 0; d < rank; ++d) {
        const int first = __shfl_sync(~0u, keys[d].begin, lane / 4 + 8 * r);
        const int last = __shfl_sync(~0u, keys[d].end, lane / 4 + 8 * r);
        mask.range[d] = {max_int(first, 0), min_int(last, KvTile::extent(d))};
      }
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
