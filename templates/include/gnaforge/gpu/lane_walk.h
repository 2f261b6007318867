// A walk over a list of tiles that is shared out among the lanes of a warp: lane d knows the tiles along axis d, lanes
// beyond the last axis what the last one's does. So all axes are worked out at the same time, and a lane's registers
// hold one of them. All lanes go through everything here together. Tiles come in the order of gnaforge/gna/walk.h.
// Device only.
#pragma once

#include "gnaforge/gna/axis.h"
#include "gnaforge/ptx/registers.h"

namespace gnaforge::gpu {

/// `AnyWarp`: of the block; else it is the first one.
template <int Rank, bool AnyWarp = true>
struct LaneWalk {
  static constexpr int rank = Rank;

  int count, interior;  ///< Of all axes, as in TileList.
  int layer;            ///< Tiles of one place along the first axis.

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

  /// What the lane of axis `d` has.
  static __device__ __forceinline__ int from_axis(int value, int d) {
    return rank == 1 ? value : __shfl_sync(~0u, value, d);
  }

 protected:
  int place_;                           ///< The tile's number along the lane's axis,
  int last_;                            ///< and the last one's,
  int interior_begin_, interior_last_;  ///< and those of interior tiles.

  /// Read anew each time, like all that follows from a lane's number: registers are few.
  static __device__ __forceinline__ int axis() {
    if constexpr (rank == 1) return 0;
    const int thread = ptx::reload_thread_index();
    return min_int(AnyWarp ? thread % 32 : thread, rank - 1);
  }

  __device__ __forceinline__ void begin(int tiles, Interval whole) {
    last_ = tiles - 1;
    interior_begin_ = whole.begin;
    interior_last_ = whole.end - 1;
    layer = 1;
    interior = 1;
#pragma unroll
    for (int e = 0; e < rank; ++e) {
      if (e > 0) layer *= from_axis(last_ + 1, e);
      interior *= from_axis(interior_last_ + 1 - interior_begin_, e);
    }
    count = layer * from_axis(last_ + 1, 0);
    restart();
  }

  /// To the first tile.
  __device__ __forceinline__ void restart() { place_ = interior > 0 ? interior_begin_ : 0; }

  static __device__ __forceinline__ bool on_all_axes(bool value) { return rank == 1 ? value : __all_sync(~0u, value); }
  static __device__ __forceinline__ bool on_some_axis(bool value) { return rank == 1 ? value : __any_sync(~0u, value); }

 private:
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

}  // namespace gnaforge::gpu
