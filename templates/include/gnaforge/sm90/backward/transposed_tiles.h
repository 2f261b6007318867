// One KV tile of one head: where it lies, and which Q tiles see it. Device only.
#pragma once

#include "gnaforge/gna/query_runs.h"
#include "gnaforge/sm90/backward/params.h"
#include "gnaforge/sm90/lane_walk.h"

namespace gnaforge::sm90::backward {

template <class KvTile>
struct KvPlace {
  static constexpr int rank = KvTile::rank;

  int slice, batch, kv_head;  ///< Batch entry within the slice.
  int k_begin[rank];          ///< A row of the slice's key tensor; the first one alone, of a piece of extra keys.
  int extra;                  ///< 0: a tile of the slice's keys. Of extra keys the number of its sums, from 1 on,
  int piece, part;            ///< and the part of the queries.

  /// Neighbouring tiles come next to each other: thread blocks that run at the same time share Q and dO in the L2
  /// cache. Of causal axes the first tiles, which most queries see, come first as they are.
  __device__ __forceinline__ KvPlace(const Params<rank>& params, int index) {
    slice = params.slice_of(index);
    index -= params.first_tile[slice];
    extra = 0;
    if (index < params.extra_tiles[slice]) {
      place_extra(params, index);
      return;
    }
    index -= params.extra_tiles[slice];
#pragma unroll
    for (int d = rank - 1; d >= 0; --d) k_begin[d] = params.kv_tiles[slice][d].split(index) * KvTile::extent(d);
    kv_head = params.kv_heads.split(index);
    batch = index;
  }

 private:
  /// Tiles of one part come next to each other.
  __device__ __forceinline__ void place_extra(const Params<rank>& params, int index) {
    const ExtraWork& work = params.extra_work;
    extra = 1 + params.first_batch(slice) * params.kv_heads.value * work.parts.value * work.tiles.value + index;
    const int tile = work.tiles.split(index);
    piece = tile >= work.second;
    k_begin[0] = (piece ? tile - work.second : tile) * KvTile::volume;
    part = work.parts.split(index);
    kv_head = params.kv_heads.split(index);
    batch = index;
  }
};

/// Bands count keys by positions in the grid: that of the first one which is stored.
template <int Rank>
__device__ __forceinline__ int first_key(const Params<Rank>& params, int slice, int d) {
  return params.group(slice, d).kv_begin;
}

/// The Q tiles of a KV tile, shared out among the lanes of a warp; see query_runs.h.
template <class QTile, class KvTile>
struct LaneQueries : LaneWalk<QTile::rank> {
  using Base = LaneWalk<QTile::rank>;
  static constexpr int rank = QTile::rank;

  __device__ __forceinline__ LaneQueries(const Params<rank>& params, const KvPlace<KvTile>& place) {
    const int d = Base::axis();
    int k_begin = place.k_begin[rank - 1];
#pragma unroll
    for (int e = 0; e < rank - 1; ++e) k_begin = d == e ? place.k_begin[e] : k_begin;
    const int first = first_key(params, place.slice, d);
    if (place.extra) {  // all there are
      const int tiles = params.q_tiles(place.slice, d, QTile::divisor(d)).value;
      runs_ = {{0, 0, 0}, {tiles, tiles, tiles}, tiles, {0, tiles}};
    } else
      runs_ = query_runs(params.template pattern<Band>(place.slice, d), k_begin + first, KvTile::extent(d),
                         params.keys[place.slice][d] + first, QTile::divisor(d));
    Base::begin(runs_.count, runs_.interior);
  }

  /// Back to the first tile.
  __device__ __forceinline__ void restart() { Base::restart(); }

  /// To tile `index` of a list of all that there are.
  __device__ __forceinline__ void go_to(const Params<rank>& params, int slice, int index) {
#pragma unroll
    for (int e = rank - 1; e >= 0; --e) {
      const int place = params.q_tiles(slice, e, QTile::divisor(e)).split(index);
      if (Base::axis() == e) Base::place_ = place;
    }
  }

  /// First query of the tile along the lane's axis.
  __device__ __forceinline__ int origin() const { return runs_.origin(Base::place_, QTile::extent(Base::axis())); }

  /// And the run that the tile is of there.
  __device__ __forceinline__ int run() const { return runs_.run(Base::place_); }

 private:
  QueryRuns runs_;
};

}  // namespace gnaforge::sm90::backward
