// The KV tiles of one Q tile, shared out among the lanes of a warp: lane d knows those along axis d, lanes beyond the
// last axis what the last one's does. So all axes are worked out at the same time, and a lane's registers hold one of
// them. All lanes go through everything here together. Device only.
#pragma once

#include "gnaforge/gna/band_tiles.h"
#include "gnaforge/gpu/work.h"
#include "gnaforge/ptx/registers.h"
#include "gnaforge/ptx/shared.h"

namespace gnaforge::sm90 {

/// `Source` is BandTiles. Tiles come in the order of its walk: see gna/walk.h. Keys are counted in rows of the key
/// tensor, where the band has positions of the grid: below a split the two are the same.
template <class Source>
struct LaneTiles {
  using QTile = typename Source::QTile;
  using KvTile = typename Source::KvTile;
  static constexpr int rank = Source::rank;

  int count, interior;  ///< Of all axes, as in TileList.

  /// What few calls have is in shared memory, from `sides` on: 16 bytes for each axis.
  static constexpr int sides_bytes = 16 * rank;

  template <class Params>
  __device__ __forceinline__ LaneTiles(const Params& params, const gpu::Place<QTile>& work, ptx::SharedAddress sides) {
    const int d = axis();
    int q_begin = work.q_begin[rank - 1];
#pragma unroll
    for (int e = 0; e < rank - 1; ++e) q_begin = d == e ? work.q_begin[e] : q_begin;
    const Band band = params.template pattern<Band>(work.slice, d);
    const int kv_begin = params.group(work.slice, d).kv_begin;
    Interval first = window(band, q_begin), last = window(band, last_query(band, q_begin, QTile::extent(d)));
    first = {first.begin - kv_begin, first.end - kv_begin};
    last = {last.begin - kv_begin, last.end - kv_begin};
    const AxisRuns own = axis_runs(band, first, last, KvTile::divisor(d));
    if (params.has_sides) {
      if (ptx::reload_thread_index() < rank) {
        const ptx::SharedAddress to = sides + 16 * d;
        ptx::store_shared_word(to, own.low_origin);
        ptx::store_shared_word(to + 4, own.low_count);
        ptx::store_shared_word(to + 8, own.count - own.turn);
        int again = d;
        asm volatile("" : "+r"(again));  // not loaded before there is a register for it
        ptx::store_shared_word(to + 12, params.call(work.slice).axis[again].gap);
      }
      __syncwarp();
    }
    last_ = own.count - 1;
    interior_begin_ = own.interior.begin;
    interior_last_ = own.interior.end - 1;
    high_begin_ = own.seen[1].begin + (own.turn - own.low_count) * KvTile::extent(d);
    count = 1;
    interior = 1;
#pragma unroll
    for (int e = 0; e < rank; ++e) {
      count *= from_axis(last_ + 1, e);
      interior *= from_axis(interior_last_ + 1 - interior_begin_, e);
    }
    place_ = interior > 0 ? interior_begin_ : 0;
  }

  /// To tile `index`, which exists, from the one before.
  __device__ __forceinline__ void step(int index) {
    if (index < interior) {
      advance(interior_begin_, interior_last_);
      return;
    }
    if (index == interior)
      place_ = 0;
    else
      advance(0, last_);
    while (on_all_axes(place_ >= interior_begin_ && place_ <= interior_last_)) {
      if (axis() == rank - 1) place_ = interior_last_;
      advance(0, last_);
    }
  }

  /// Where a tile is along the lane's axis.
  struct Spot {
    int origin;  ///< Its first row,
    int stored;  ///< and where that is in the key tensor: stored_row of band.h.
    bool below;  ///< Whether the tile is below the split of some axis.
  };

  template <class Params>
  __device__ __forceinline__ Spot spot(const Params& params, ptx::SharedAddress sides) const {
    const int extent = KvTile::extent(axis());
    const int high = high_begin_ + place_ * extent;
    if (!params.has_sides) return {high, high, false};
    const int4 own = ptx::load_shared(sides + 16 * axis());
    const int low_origin = own.x, low_count = own.y, turned_end = own.z, gap = own.w;
    const bool below = place_ < low_count;
    Spot spot{high, high - gap, on_some_axis(below)};
    if (below) {
      spot.origin = low_origin + place_ * extent;
      spot.stored = spot.origin + extent <= 0 ? spot.origin + gap : spot.origin;
    } else if (place_ >= turned_end) {  // the upper run's first tiles, which come last
      const int turn = (last_ + 1 - low_count) * extent;
      spot.origin -= turn;
      spot.stored -= turn;
    }
    return spot;
  }

  /// What the lane of axis `d` has.
  static __device__ __forceinline__ int from_axis(int value, int d) {
    return rank == 1 ? value : __shfl_sync(~0u, value, d);
  }

 private:
  int place_;                           ///< The tile's number along the lane's axis,
  int last_;                            ///< and the last one's,
  int interior_begin_, interior_last_;  ///< and those of interior tiles: see AxisRuns.
  int high_begin_;                      ///< Of the run from the split on, where tile 0 would be.

  /// Read anew each time, like all that follows from a lane's number: registers are few.
  static __device__ __forceinline__ int axis() { return rank == 1 ? 0 : min_int(ptx::reload_thread_index(), rank - 1); }

  static __device__ __forceinline__ bool on_all_axes(bool value) { return rank == 1 ? value : __all_sync(~0u, value); }
  static __device__ __forceinline__ bool on_some_axis(bool value) { return rank == 1 ? value : __any_sync(~0u, value); }

  /// To the next of the tiles from `begin` to `last` of each axis, in row-major order: an axis goes on where all axes
  /// further in are at their last one.
  __device__ __forceinline__ void advance(int begin, int last) {
    if constexpr (rank == 1) {
      ++place_;
    } else {
      const bool ends = place_ == last;
      const unsigned all_ends = __ballot_sync(~0u, ends), further_in = ptx::lanes_above() & ((1u << rank) - 1);
      if ((all_ends & further_in) == further_in) place_ = ends ? begin : place_ + 1;
    }
  }
};

}  // namespace gnaforge::sm90
