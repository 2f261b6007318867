// The KV tiles of one Q tile, shared out among the lanes of a warp: lane d knows those along axis d, lanes beyond the
// last axis what the last one's does. So all axes are worked out at the same time, and a lane's registers hold one of
// them. All lanes go through everything here together. Device only.
#pragma once

#include "gnaforge/gna/band_tiles.h"
#include "gnaforge/gpu/work.h"
#include "gnaforge/ptx/registers.h"

namespace gnaforge::sm90 {

/// `Source` is BandTiles. Tiles come in the order of its walk: see gna/walk.h. Keys are counted in rows of the key
/// tensor, where the band has positions of the grid: below a split the two are the same.
template <class Source>
struct LaneTiles {
  using QTile = typename Source::QTile;
  using KvTile = typename Source::KvTile;
  static constexpr int rank = Source::rank;

  int count, interior;  ///< Of all axes, as in TileList.

  __device__ __forceinline__ LaneTiles(const gpu::Params<rank>& params, const gpu::Place<QTile>& work) {
    const int d = axis();
    int q_begin = work.q_begin[rank - 1];
#pragma unroll
    for (int e = 0; e < rank - 1; ++e) q_begin = d == e ? work.q_begin[e] : q_begin;
    const Band band = params.template pattern<Band>(work.slice, d);
    const int kv_begin = params.slices[work.slice].group[d].kv_begin;
    const Interval first = window(band, q_begin), last = window(band, last_query(band, q_begin, QTile::extent(d)));
    own = axis_runs(band, Interval{first.begin - kv_begin, first.end - kv_begin},
                    Interval{last.begin - kv_begin, last.end - kv_begin}, KvTile::divisor(d));
    gap = band.gap;
    count = 1;
    interior = 1;
#pragma unroll
    for (int e = 0; e < rank; ++e) {
      count *= from_axis(own.count, e);
      interior *= from_axis(own.interior.end - own.interior.begin, e);
    }
    place = interior > 0 ? own.interior.begin : 0;
  }

  /// To tile `index`, which exists, from the one before.
  __device__ __forceinline__ void step(int index) {
    if (index < interior) {
      advance(own.interior.begin, own.interior.end);
      return;
    }
    if (index == interior)
      place = 0;
    else
      advance(0, own.count);
    while (on_all_axes(place >= own.interior.begin && place < own.interior.end)) {
      if (axis() == rank - 1) place = own.interior.end - 1;
      advance(0, own.count);
    }
  }

  /// The first row of the tile along the lane's axis.
  __device__ __forceinline__ int origin() const { return own.origin(place, KvTile::extent(axis())); }

  /// And where that is in the key tensor: stored_row of band.h, which asks what is known here.
  __device__ __forceinline__ int stored(int origin) const {
    if (!is_below_split()) return origin - gap;
    return origin + KvTile::extent(axis()) <= 0 ? origin + gap : origin;
  }

  /// Of the index-th tile.
  __device__ __forceinline__ TileKind kind(int index) const {
    const bool below = rank == 1 ? is_below_split() : __any_sync(~0u, is_below_split());
    return index < interior ? TileKind::interior : below ? TileKind::shell_below : TileKind::shell;
  }

  /// What the lane of axis `d` has.
  static __device__ __forceinline__ int from_axis(int value, int d) {
    return rank == 1 ? value : __shfl_sync(~0u, value, d);
  }

 private:
  AxisRuns own;  ///< Of the lane's axis.
  int place;     ///< The tile's number along it.
  int gap;       ///< Of the Band.

  /// Read anew each time, like all that follows from a lane's number: registers are few.
  static __device__ __forceinline__ int axis() { return rank == 1 ? 0 : min_int(ptx::reload_thread_index(), rank - 1); }

  __device__ __forceinline__ bool is_below_split() const { return place < own.low_count; }

  static __device__ __forceinline__ bool on_all_axes(bool value) { return rank == 1 ? value : __all_sync(~0u, value); }

  /// To the next of the tiles from `begin` to `end` of each axis, in row-major order: an axis goes on where all axes
  /// further in are at their ends.
  __device__ __forceinline__ void advance(int begin, int end) {
    const bool last = place + 1 == end;
    if constexpr (rank == 1) {
      ++place;
    } else {
      const unsigned ends = __ballot_sync(~0u, last), further_in = ptx::lanes_above() & ((1u << rank) - 1);
      if ((ends & further_in) == further_in) place = last ? begin : place + 1;
    }
  }
};

}  // namespace gnaforge::sm90
