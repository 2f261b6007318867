// The KV tiles of one Q tile, shared out among the lanes of a warp: lane d knows those along axis d, lanes beyond the
// last axis what the last one's does. So all axes are worked out at the same time, and a lane's registers hold one of
// them. All lanes go through everything here together. Device only.
#pragma once

#include "gnaforge/gna/band_tiles.h"
#include "gnaforge/gpu/work.h"

namespace gnaforge::sm90 {

/// `Source` is BandTiles. Tiles come in the order of its walk: see gna/walk.h.
template <class Source>
struct LaneTiles {
  using KvTile = typename Source::KvTile;
  static constexpr int rank = Source::rank;

  AxisRuns own;         ///< Of the lane's axis.
  int axis;             ///< Which one that is.
  int place;            ///< The tile's number along it.
  int count, interior;  ///< Of all axes, as in TileList.
  int split, gap, kv_begin;

  __device__ __forceinline__ LaneTiles(const gpu::Params<rank>& params, const gpu::Place<typename Source::QTile>& work,
                                       int lane) {
    axis = rank == 1 ? 0 : min_int(lane, rank - 1);
    int q_begin = work.q_begin[rank - 1];
#pragma unroll
    for (int d = 0; d < rank - 1; ++d) q_begin = axis == d ? work.q_begin[d] : q_begin;
    const Band band = params.template pattern<Band>(work.slice, axis);
    own = Source::along(band, q_begin, axis);
    split = band.split;
    gap = band.gap;
    kv_begin = params.slices[work.slice].group[axis].kv_begin;
    count = 1;
    interior = 1;
#pragma unroll
    for (int d = 0; d < rank; ++d) {
      count *= from_axis(own.count, d);
      interior *= from_axis(own.interior.end - own.interior.begin, d);
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
      if (axis == rank - 1) place = own.interior.end - 1;
      advance(0, own.count);
    }
  }

  /// The first row of the tile along the lane's axis.
  __device__ __forceinline__ int origin() const { return own.origin(place, KvTile::extent(axis)); }

  /// And where that is in the key tensor.
  __device__ __forceinline__ int stored(int origin) const {
    const int extent = KvTile::extent(axis);
    return (origin + extent <= 0 ? origin + gap : origin >= split ? origin - gap : origin) - kv_begin;
  }

  /// Of the index-th tile, where the lane's axis has it.
  __device__ __forceinline__ TileKind kind(int index, int origin) const {
    const bool below = rank == 1 ? origin < split : __any_sync(~0u, origin < split);
    return index < interior ? TileKind::interior : below ? TileKind::shell_below : TileKind::shell;
  }

  /// What the lane of axis `d` has.
  static __device__ __forceinline__ int from_axis(int value, int d) {
    return rank == 1 ? value : __shfl_sync(~0u, value, d);
  }

 private:
  static __device__ __forceinline__ bool on_all_axes(bool value) { return rank == 1 ? value : __all_sync(~0u, value); }

  /// To the next of the tiles from `begin` to `end` of each axis, in row-major order: an axis goes on where all axes
  /// further in are at their ends.
  __device__ __forceinline__ void advance(int begin, int end) {
    const bool last = place + 1 == end;
    if constexpr (rank == 1) {
      ++place;
    } else {
      const unsigned ends = __ballot_sync(~0u, last), further_in = ((1u << rank) - 1) & (~1u << axis);
      if ((ends & further_in) == further_in) place = last ? begin : place + 1;
    }
  }
};

}  // namespace gnaforge::sm90
