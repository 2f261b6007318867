// How the rows of delta are shared out among threads. Host and device.
#pragma once

#include "gnaforge/gna/axis.h"

namespace gnaforge::sm90::backward {

constexpr int delta_threads = 256;

constexpr int sum_threads = 256, sum_warps = sum_threads / 32;  ///< And those of sums.h.

/// Each lane has 16 bytes of a row of `Channels` 16-bit elements; neighbouring lanes, a power of two, share a row.
template <int Channels>
struct DeltaLanes {
  static constexpr int pieces = Channels / 8;
  static constexpr int per_row = pieces > 16 ? 32 : pieces > 8 ? 16 : pieces > 4 ? 8 : pieces > 2 ? 4 : pieces;
  static constexpr int rows_per_block = delta_threads / per_row;
  static_assert(Channels % 8 == 0 && pieces <= 32, "a warp has a row's channels");
};

}  // namespace gnaforge::sm90::backward
