// The KV tiles of one Q tile, shared out among the lanes of a warp; see lane_walk.h. Device only.
#pragma once

#include "gnaforge/gna/band_tiles.h"
#include "gnaforge/gpu/lane_walk.h"
#include "gnaforge/gpu/work.h"
#include "gnaforge/ptx/shared.h"

namespace gnaforge::gpu {

/// `Source` is BandTiles. Keys are counted in rows of the key tensor, where the band has positions of the grid: below a
/// split the two are the same.
template <class Source>
struct LaneTiles : LaneWalk<Source::rank, false> {
  using Base = LaneWalk<Source::rank, false>;
  using QTile = typename Source::QTile;
  using KvTile = typename Source::KvTile;
  static constexpr int rank = Source::rank;

  /// What few calls have is in shared memory, from `sides` on: 16 bytes for each axis.
  static constexpr int sides_bytes = 16 * rank;

  /// `params` is a LaunchParams, or has what that has.
  template <class Params>
  __device__ __forceinline__ LaneTiles(const Params& params, const Place<QTile>& work, ptx::SharedAddress sides) {
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
    high_begin_ = own.seen[1].begin + (own.turn - own.low_count) * KvTile::extent(d);
    rows_of_last_ = own.rows_of_last(KvTile::extent(d));
    Base::begin(own.count, own.interior);
  }

  /// Rows along the first axis that are seen of its last tiles, by some query: those that come last, if it isn't all.
  __device__ __forceinline__ int rows_of_last() const { return Base::from_axis(rows_of_last_, 0); }

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

 private:
  using Base::axis;
  using Base::last_;
  using Base::on_some_axis;
  using Base::place_;

  int high_begin_;    ///< Of the run from the split on, where tile 0 would be.
  int rows_of_last_;  ///< See AxisRuns.
};

}  // namespace gnaforge::gpu
