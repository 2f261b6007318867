// The Q tiles of one KV tile along one axis, in the order in which a kernel whose rows are keys comes by them. Host and
// device, no torch, no STL.
#pragma once

#include "gnaforge/gna/band_tiles.h"

namespace gnaforge {

/// On an axis that wraps, a stored row stands for three rows of its band: image 1 is `gap` later, image -1 `gap`
/// earlier. Where the grid's first keys are stored before others, image 0 has the first ones and image 1 the others.
constexpr int most_images = 3;

/// Q tiles as indices 0 .. count - 1: a run of tiles side by side for each image of the KV tile's rows, in the order 1,
/// 0, -1. Where the band has no gap there is image 0 alone. In that order interior tiles are next to each
/// other: who sees all rows a gap later is among the last queries, and who sees them where they are goes on from the
/// first one.
struct QueryRuns {
  int begin[most_images];  ///< First query of each run,
  int end[most_images];    ///< and the index after its last tile.
  int count;
  Interval interior;  ///< Tiles in which every query sees every row; {0, 0} if none.

  /// Which run tile `index` is of.
  GNAFORGE_HD int run(int index) const { return (index >= end[0]) + (index >= end[1]); }

  /// First query of tile `index`.
  GNAFORGE_HD int origin(int index, int extent) const {
    const int first = index < end[0] ? begin[0] : index < end[1] ? begin[1] : begin[2];
    return first + (index - (index < end[0] ? 0 : index < end[1] ? end[0] : end[1])) * extent;
  }
};

/// By how much the rows of run `run` are later than those that are stored.
GNAFORGE_HD int image_shift(const Band& band, int run) { return (1 - run) * band.gap; }

/// The rows that are stored where run `run` has them: see Band::gap. Others of a KV tile are stored there as another
/// row, which its own run has.
GNAFORGE_HD Interval rows_of_run(const Band& band, int run) {
  if (band.gap == 0) return {-far_away, far_away};
  if (run == 0) return {max_int(band.split, window(band, 0).begin), far_away};  // nobody sees what is before
  return run == 1 ? Interval{0, band.split} : Interval{min_int(band.begin_min, 0), 0};
}

/// Q tiles of `extent` queries of the rows [k_begin, k_begin + k_extent) as far as they are below `k_end`, of which the
/// first exists.
GNAFORGE_HD QueryRuns query_runs(const Band& band, int k_begin, int k_extent, int k_end, Divisor extent) {
  QueryRuns runs;
  runs.count = 0;
  runs.interior = {0, 0};
  GNAFORGE_UNROLL
  for (int run = 0; run < most_images; ++run) {
    runs.begin[run] = 0;
    if (run == 1 || band.gap != 0) {
      const int shift = image_shift(band, run);
      const Interval whole{k_begin + shift, min_int(k_begin + k_extent, k_end) + shift}, there = rows_of_run(band, run);
      const Interval own{max_int(whole.begin, there.begin), min_int(whole.end, there.end)};
      if (own.begin < own.end) {
        const AxisQueries tiles = axis_queries(band, own.begin, own.end - own.begin, own.end, extent);
        runs.begin[run] = tiles.visited.begin;
        if (own.begin == whole.begin && own.end == whole.end && tiles.interior.begin < tiles.interior.end) {
          if (runs.interior.begin == runs.interior.end) runs.interior.begin = runs.count + tiles.interior.begin;
          runs.interior.end = runs.count + tiles.interior.end;
        }
        runs.count += tiles.count;
      }
    }
    runs.end[run] = runs.count;
  }
  return runs;
}

/// Queries that see the stored row `key` by the image of run `run`; none of a row that doesn't exist.
GNAFORGE_HD Interval queries_of_key(const Band& band, int key, int run) {
  const int row = key + image_shift(band, run);
  const Interval there = rows_of_run(band, run);
  return row >= there.begin && row < there.end ? transposed_window(band, row) : Interval{0, 0};
}

}  // namespace gnaforge
