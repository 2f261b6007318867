// What CUTLASS's mainloop asks of a mask: how many KV tiles there are, which of them need masking, and the masking.
// Device only.
#pragma once

#include <cute/tensor.hpp>

#include "gnaforge/gpu/work.h"
#include "gnaforge/sm100/cutlass/layout.h"

namespace gnaforge::sm100_cutlass {

/// Where a softmax warp is among the tiles that it masks. In shared memory: beside a row of scores there is no room in
/// registers for what is the same for all rows.
template <class Source>
struct MaskState {
  typename Source::List list;
  typename Source::Walk walk;
};

/// The fifth leaf of the mainloop's problem shape, which it hands through to the mask. The mainloop copies it once per
/// Q tile, so that `begun` is of one Q tile.
template <class Source>
struct GnaShape {
  const gpu::Params<Source::rank>* params;
  MaskState<Source>* state;  ///< The warp's own.
  mutable bool begun;
  mutable Interval row[Source::rank];  ///< Keys that the thread's row sees.
};

/// The mainloop's block coordinate is the index of a Q tile among those of all heads and batch entries. It makes a
/// fresh Mask for each question.
template <class Config>
struct Mask {
  using Source = TileSource<Config>;
  using List = typename Source::List;
  using Shape = GnaShape<Source>;
  using Work = gpu::Work<Source>;
  using KvTile = typename Config::KvTile;
  using Half = HalfTile<typename Config::QTile>;
  static constexpr int rank = Source::rank;
  /// Columns beyond the KV tile are masked in every tile.
  static constexpr bool padded = KvTile::volume < columns;

  template <class ProblemShape>
  static __device__ __forceinline__ const Shape& gna_shape(const ProblemShape& shape) {
    return cute::get<4>(shape);
  }

  template <class ProblemShape>
  static __device__ __forceinline__ List list(int tile, const ProblemShape& shape) {
    return Work(*gna_shape(shape).params, tile).list;
  }

  static __device__ __forceinline__ int unmasked(const List& list) { return padded ? 0 : list.interior; }

  template <class Block, class Tile, class ProblemShape>
  __device__ __forceinline__ int get_trip_count(const Block& block, const Tile&, const ProblemShape& shape) const {
    return list(cute::get<0>(block), shape).count;
  }

  template <class Block, class Tile, class ProblemShape>
  __device__ __forceinline__ int get_unmasked_trip_count(const Block& block, const Tile&,
                                                         const ProblemShape& shape) const {
    return unmasked(list(cute::get<0>(block), shape));
  }

  template <class Block, class Tile, class ProblemShape>
  __device__ __forceinline__ int get_masked_trip_count(const Block& block, const Tile&,
                                                       const ProblemShape& shape) const {
    const List tiles = list(cute::get<0>(block), shape);
    return tiles.count - unmasked(tiles);
  }

  /// Position of row `row` of a Q tile. Rows beyond the tile repeat others, and tokens that don't exist the last one.
  static __device__ __forceinline__ int position(const Axis& axis, int d, int q_begin, int row) {
    const int token = row % half_rows / Half::pitch(d) % Half::extent(d);
    return min_int(q_begin + Half::begin(row / half_rows, d) + token, axis.length - 1);
  }

  /// Before the first tile to be masked, for row `row` of all tiles.
  static __device__ __forceinline__ void begin(const Shape& own, int row, MaskState<Source>& state) {
    const Work work(*own.params, row / (halves * half_rows));
    state.list = work.list;
    if (padded)
      state.walk.begin(state.list);
    else
      state.walk.begin_shell(state.list);
#pragma unroll
    for (int d = 0; d < rank; ++d) {
      const auto axis = own.params->template pattern<typename Source::Pattern>(work.slice, d);
      own.row[d] = Source::row(axis, position(axis, d, work.q_begin[d], row % (halves * half_rows)));
    }
    own.begun = true;
  }

  /// `scores` is one row of a KV tile; `index` tells the row among those of all tiles, and the first column, 128 times
  /// the position of the KV tile in the list.
  template <class Scores, class Index, class ProblemShape>
  __device__ __forceinline__ void apply_mask(Scores& scores, const Index& index, const ProblemShape& shape) const {
    static_assert(cute::size(Scores{}) == columns, "a thread has one row of a whole KV tile");
    const auto first = index(cute::_0{});
    const int tile = cute::get<1>(first) / columns;
    const Shape& own = gna_shape(shape);
    MaskState<Source> state;
    if (!own.begun) {
      begin(own, cute::get<0>(first), state);
      __syncwarp();  // every lane has read the state of the Q tile before
      if (threadIdx.x % 32 == 0) own.state->list = state.list;
    } else {
      state = *own.state;
      state.walk.step(state.list, tile);
      __syncwarp();  // every lane has read it
    }
    if (threadIdx.x % 32 == 0) own.state->walk = state.walk;
    __syncwarp();
    Interval seen[rank];
#pragma unroll
    for (int d = 0; d < rank; ++d)
      seen[d] = Source::seen(own.params->template pattern<typename Source::Pattern>(0, d), own.row[d],
                             Source::origin(state.list, state.walk, d));
    unsigned mask[RowMask<KvTile>::words];
    RowMask<KvTile>::find(seen, mask);
#pragma unroll
    for (int word = 0; word < columns / 32; ++word) {
      const unsigned bits = word < RowMask<KvTile>::words ? mask[word] : 0;
#pragma unroll
      for (int i = 0; i < 32; ++i)
        if (!(bits >> i & 1)) scores(32 * word + i) = -INFINITY;
    }
  }
};

}  // namespace gnaforge::sm100_cutlass
