// What CUTLASS's mainloop asks of a mask: how many KV tiles there are, which of them need masking, and the masking.
// Device only.
#pragma once

#include <cute/tensor.hpp>

#include "gnaforge/gna/mask.h"
#include "gnaforge/gpu/work.h"
#include "gnaforge/sm100/cutlass/layout.h"

namespace gnaforge::sm100 {

/// Where a softmax warp is among the tiles that it masks. In shared memory: beside a row of scores there is no room in
/// registers for what is the same for all rows.
template <int Rank>
struct MaskState {
  TileList<Rank> list;
  TileWalk<Rank> walk;
};

/// The fifth leaf of the mainloop's problem shape, which it hands through to the mask. The mainloop copies it once per Q
/// tile, so that `begun` is of one Q tile.
template <int Rank>
struct Problem {
  const gpu::Params<Rank>* params;
  MaskState<Rank>* state;  ///< The warp's own.
  mutable bool begun;
  mutable Interval keys[Rank];  ///< That the thread's row sees.
};

/// The steps over the tiles of a list: interior ones, then the shell.
template <int Rank>
__device__ __forceinline__ void begin_walk(TileWalk<Rank>& walk, const TileList<Rank>& list) {
  if (list.interior > 0)
    walk.begin_interior(list);
  else
    walk.begin_shell(list);
}

/// From tile `index` - 1 to tile `index`, which exists.
template <int Rank>
__device__ __forceinline__ void step_walk(TileWalk<Rank>& walk, const TileList<Rank>& list, int index) {
  if (index < list.interior)
    walk.next_interior(list);
  else if (index == list.interior)
    walk.begin_shell(list);
  else
    walk.next_shell(list);
}

/// The mainloop's block coordinate is the index of a Q tile among those of all heads and batch entries. It makes a
/// fresh Mask for each question.
template <class Config>
struct Mask {
  using QTile = typename Config::QTile;
  using KvTile = typename Config::KvTile;
  using Half = HalfTile<QTile>;
  static constexpr int rank = QTile::rank;
  /// Columns beyond the KV tile are masked in every tile.
  static constexpr bool padded = KvTile::volume < columns;

  template <class Shape>
  static __device__ __forceinline__ const Problem<rank>& problem(const Shape& shape) {
    return cute::get<4>(shape);
  }

  template <class Shape>
  static __device__ __forceinline__ TileList<rank> list(int tile, const Shape& shape) {
    return gpu::Work<Config>(*problem(shape).params, tile).list;
  }

  static __device__ __forceinline__ int unmasked(const TileList<rank>& list) { return padded ? 0 : list.interior; }

  template <class Block, class Tile, class Shape>
  __device__ __forceinline__ int get_trip_count(const Block& block, const Tile&, const Shape& shape) const {
    return list(cute::get<0>(block), shape).count;
  }

  template <class Block, class Tile, class Shape>
  __device__ __forceinline__ int get_unmasked_trip_count(const Block& block, const Tile&, const Shape& shape) const {
    return unmasked(list(cute::get<0>(block), shape));
  }

  template <class Block, class Tile, class Shape>
  __device__ __forceinline__ int get_masked_trip_count(const Block& block, const Tile&, const Shape& shape) const {
    const TileList<rank> tiles = list(cute::get<0>(block), shape);
    return tiles.count - unmasked(tiles);
  }

  /// Position of row `row` of a Q tile. Rows beyond the tile repeat others, and tokens that don't exist the last one.
  static __device__ __forceinline__ int position(const Axis& axis, int d, int q_begin, int row) {
    const int token = row % half_rows / Half::pitch(d) % Half::extent(d);
    return min_int(q_begin + Half::begin(row / half_rows, d) + token, axis.length - 1);
  }

  /// Before the first tile to be masked, for row `row` of all tiles.
  static __device__ __forceinline__ void begin(const Problem<rank>& own, int row, MaskState<rank>& state) {
    const gpu::Work<Config> work(*own.params, row / (halves * half_rows));
    state.list = work.list;
    if (padded)
      begin_walk(state.walk, state.list);
    else
      state.walk.begin_shell(state.list);
#pragma unroll
    for (int d = 0; d < rank; ++d) {
      const Axis axis = own.params->axis_of(work.slice, d);
      own.keys[d] = window(axis, position(axis, d, work.q_begin[d], row % (halves * half_rows)));
    }
    own.begun = true;
  }

  /// `scores` is one row of a KV tile; `index` tells the row among those of all tiles, and the first column, 128 times
  /// the position of the KV tile in the list.
  template <class Scores, class Index, class Shape>
  __device__ __forceinline__ void apply_mask(Scores& scores, const Index& index, const Shape& shape) const {
    static_assert(cute::size(Scores{}) == columns, "a thread has one row of a whole KV tile");
    const auto first = index(cute::_0{});
    const int tile = cute::get<1>(first) / columns;
    const Problem<rank>& own = problem(shape);
    MaskState<rank> state;
    if (!own.begun) {
      begin(own, cute::get<0>(first), state);
      __syncwarp();  // every lane has read the state of the Q tile before
      if (threadIdx.x % 32 == 0) own.state->list = state.list;
    } else {
      state = *own.state;
      step_walk(state.walk, state.list, tile);
      __syncwarp();  // every lane has read it
    }
    if (threadIdx.x % 32 == 0) own.state->walk = state.walk;
    __syncwarp();
    RowMask<KvTile> mask;
#pragma unroll
    for (int d = 0; d < rank; ++d) {
      const int origin = state.walk.template origin<KvTile>(state.list, d);
      mask.range[d] = {max_int(own.keys[d].begin - origin, 0), min_int(own.keys[d].end - origin, KvTile::extent(d))};
    }
#pragma unroll
    for (int word = 0; word < columns / 32; ++word) {
      const unsigned bits = 32 * word < KvTile::volume ? mask.word(word) : 0;
#pragma unroll
      for (int i = 0; i < 32; ++i)
        if (!(bits >> i & 1)) scores(32 * word + i) = -INFINITY;
    }
  }
};

}  // namespace gnaforge::sm100
