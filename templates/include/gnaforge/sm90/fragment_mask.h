// Masks of shell tiles in the layout of wgmma's accumulator. Device only.
#pragma once

#include "gnaforge/mask.h"
#include "gnaforge/sm90/layout.h"
#include "gnaforge/sm90/softmax.h"
#include "gnaforge/sm90/work.h"

namespace gnaforge::sm90 {

/// Windows of a warp's 16 rows. Lane i holds those of row i % 16, computed once per Q tile.
template <class Config>
struct RowWindows {
  using QTile = typename Config::QTile;
  using KvTile = typename Config::KvTile;
  static constexpr int rank = QTile::rank;

  Interval keys[rank];

  /// `first_row` is the warp's, within the Q tile.
  __device__ __forceinline__ void compute(const Params<rank>& params, const Work<Config>& work, int first_row) {
    const int row = first_row + static_cast<int>(threadIdx.x % 16);
#pragma unroll
    for (int d = 0; d < rank; ++d) {
      const int position = work.q_begin[d] + row / QTile::pitch(d) % QTile::extent(d);
      // Rows of tokens that don't exist get the last one's window; nobody stores them.
      keys[d] = window(params.axis[d], min_int(position, params.axis[d].length - 1));
    }
  }

  /// Sets scores of keys that a row doesn't see to -infinity; `origin` is the KV tile's first key.
  template <int N>
  __device__ __forceinline__ void apply(float (&scores)[N], const int (&origin)[rank]) const {
    static_assert(N == KvTile::volume / 2, "one accumulator per tile");
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      RowMask<KvTile> mask;
#pragma unroll
      for (int d = 0; d < rank; ++d) {
        const int begin = __shfl_sync(~0u, keys[d].begin, lane / 4 + 8 * r);
        const int end = __shfl_sync(~0u, keys[d].end, lane / 4 + 8 * r);
        mask.range[d] = {max_int(begin - origin[d], 0), min_int(end - origin[d], KvTile::extent(d))};
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
