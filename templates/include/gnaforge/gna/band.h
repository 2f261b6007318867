// A band: what queries see along one token dimension, for every setting that there is (edges, causal kinds, sinks,
// ranges of a grid), as numbers that a kernel applies without knowing which setting they stand for. pattern.h makes
// them. Host and device, no torch, no STL.
#pragma once

#include "gnaforge/gna/axis.h"

namespace gnaforge {

/// More than any position; its sum with a position fits an int.
constexpr int far_away = 1 << 30;

/// One dilation group of one axis. Queries and keys are counted in rows: of the query tensor's and the key tensor's
/// part of the group. Keys may have rows that are not stored there: on an axis that wraps, row r and row r + gap are
/// one key.
///
/// Row q sees the rows from `begin` to `end`, both of which never fall with q:
///   at    = q + phase, its position in the group of the grid
///   raw   = at - at % stride + first
///   begin = clamp(raw, begin_min, begin_max)
///   end   = min(clamp(raw + window, end_min, end_max), at + ahead)
/// Rows below `split` are a side of their own, which no tile has in common with the rest. There it sees the rows from
/// min(begin, low_begin) to min(split, end + low_slack): a sink, or the part before the end of an axis that wraps.
struct Band {
  int queries;
  Divisor stride;
  int phase, first, window;
  int begin_min, begin_max, end_min, end_max;
  int ahead;
  int split, low_begin, low_slack;
  int gap;  ///< Rows below 0 are stored gap rows later, those from the split on gap rows earlier.
};

GNAFORGE_HD constexpr int clamp_int(int x, int low, int high) { return min_int(max_int(x, low), high); }

/// Rows that `query` sees, but for what only the lower side has.
GNAFORGE_HD Interval window(const Band& band, int query) {
  const int at = query + band.phase;
  const int raw = band.stride.floor(at) + band.first;
  return {clamp_int(raw, band.begin_min, band.begin_max),
          min_int(clamp_int(raw + band.window, band.end_min, band.end_max), at + band.ahead)};
}

/// A window of a query that doesn't exist: nothing of it is on any side.
constexpr Interval no_window{far_away, -far_away};

/// On the side that row `origin` is on, what a query sees whose window is `keys`.
GNAFORGE_HD Interval on_side(const Band& band, Interval keys, int origin) {
  const bool low = origin < band.split;  // chosen by, and no branch, which would hold more in registers
  return {min_int(keys.begin, low ? band.low_begin : far_away),
          low ? min_int(band.split, keys.end + band.low_slack) : keys.end};
}

/// Where in the key tensor's part of the group the box of `extent` rows from `row` on is. It may stick out at either
/// end, with rows that nobody sees: so a box that begins below 0 isn't all before the seam.
GNAFORGE_HD int stored_row(const Band& band, int row, int extent) {
  return row + extent <= 0 ? row + band.gap : row >= band.split ? row - band.gap : row;
}

/// Rounds down, also below 0.
GNAFORGE_HD constexpr int floor_div(int a, int b) { return a / b - (a % b < 0); }

/// Query rows that see row `key`: one interval, because begins and ends never fall. Of an axis that wraps, a stored key
/// is three rows, key - gap, key and key + gap; at most two of the three are seen by anyone, each query sees one of
/// them.
GNAFORGE_HD Interval transposed_window(const Band& band, int key) {
  const bool low = key < band.split && band.low_begin < far_away;  // a sink
  // Those whose window ends after the key: from `begin` on.
  int begin = 0;
  if (!(low && band.low_slack > 0)) {
    if (key >= band.end_max)
      begin = band.queries;
    else if (key >= band.end_min)  // raw + window > key
      begin = -floor_div(-(key - band.window + 1 - band.first), band.stride.value) * band.stride.value - band.phase;
    if (band.ahead < far_away) begin = max_int(begin, key - band.ahead + 1 - band.phase);
  }
  // Those whose window begins at or before it: up to `end`.
  int end = band.queries;
  if (low)
    end = key < band.low_begin ? 0 : band.queries;
  else if (key < band.begin_min)
    end = 0;
  else if (key < band.begin_max)  // raw <= key
    end = (floor_div(key - band.first, band.stride.value) + 1) * band.stride.value - band.phase;
  begin = clamp_int(begin, 0, band.queries);
  return {begin, max_int(begin, min_int(end, band.queries))};
}

}  // namespace gnaforge
