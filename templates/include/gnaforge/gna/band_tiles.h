// Which KV tiles a Q tile visits along an axis that is a Band, and which Q tiles a KV tile. Host and device, no torch,
// no STL.
#pragma once

#include "gnaforge/gna/band.h"
#include "gnaforge/gna/source.h"

namespace gnaforge {

/// The KV tiles of one Q tile along one axis, as indices 0 .. count - 1. They are one or two runs of tiles that lie
/// side by side; the second begins at the band's split. Interior tiles are next to each other in index.
struct AxisRuns {
  Interval seen[2];   ///< Rows that some query of the Q tile sees, below the split and from there on.
  int low_origin;     ///< First row of the first run's first tile; that of the second is seen[1].begin.
  int count;          ///< Tiles of both runs.
  int low_count;      ///< Tiles of the first run, that below the split.
  int turn;           ///< The second run's indices begin at this tile of it and come round.
  Interval interior;  ///< Tiles in which every query sees every row; {0, 0} if none.

  /// First row of tile `index`.
  GNAFORGE_HD int origin(int index, int extent) const {
    if (index < low_count) return low_origin + index * extent;
    index += turn;
    if (index >= count) index -= count - low_count;
    return seen[1].begin + (index - low_count) * extent;
  }

  /// Rows of the last tile up to the last that some query sees; all if some tile is below the split.
  GNAFORGE_HD int rows_of_last(int extent) const {
    return low_count > 0 || count == 0 ? extent : seen[1].end - seen[1].begin - (count - 1) * extent;
  }

  /// Rows of tile `index` that some query of the Q tile sees.
  GNAFORGE_HD Interval rows(int index, int extent) const {
    const Interval& side = seen[index < low_count ? 0 : 1];
    const int begin = origin(index, extent);
    return {max_int(begin, side.begin), min_int(begin + extent, side.end)};
  }
};

/// Tiles of `extent` rows from `origin` on that lie within `rows`, of `count` tiles.
GNAFORGE_HD Interval whole_tiles(Interval rows, int origin, Divisor extent, int count) {
  const int begin = extent.quotient_up(max_int(rows.begin - origin, 0));
  const int end = min_int(extent.quotient(max_int(rows.end - origin, 0)), count);
  return begin < end ? Interval{begin, end} : Interval{0, 0};
}

/// Tiles of neighbouring query rows, of which the first and the last have these windows.
GNAFORGE_HD AxisRuns axis_runs(const Band& band, Interval first, Interval last, Divisor extent) {
  AxisRuns runs;
  // From the split on; most axes have nothing else.
  runs.seen[0] = {0, 0};
  runs.seen[1] = {max_int(first.begin, band.split), last.end};
  runs.low_origin = 0;
  runs.low_count = 0;
  runs.turn = 0;
  runs.count = extent.quotient_up(max_int(last.end - runs.seen[1].begin, 0));
  runs.interior = whole_tiles({last.begin, first.end}, runs.seen[1].begin, extent, runs.count);
  if (band.split == -far_away) return runs;
  const Interval any{min_int(first.begin, band.low_begin), min_int(band.split, last.end + band.low_slack)};
  if (any.begin >= any.end) return runs;
  const Interval all{min_int(last.begin, band.low_begin), min_int(band.split, first.end + band.low_slack)};
  // Tiles begin at a seam, be it one that they cross (row 0) or where they stop (the split): a box has no hole, and
  // whole tiles on both sides are neighbours.
  const int seam = any.begin < 0 ? 0 : last.end > band.split ? band.split : any.begin;
  runs.seen[0] = any;
  runs.low_origin = seam > any.begin ? seam - extent.quotient_up(seam - any.begin) * extent.value : any.begin;
  runs.low_count = extent.quotient_up(any.end - runs.low_origin);
  runs.count += runs.low_count;
  const Interval low = whole_tiles(all, runs.low_origin, extent, runs.low_count), high = runs.interior;
  if (low.begin == low.end) {
    if (high.begin < high.end) runs.interior = {runs.low_count + high.begin, runs.low_count + high.end};
  } else if (high.begin == high.end) {
    runs.interior = low;
  } else {  // the lower side's whole tiles end at the seam; the upper side's are made to begin there
    runs.turn = high.begin;
    runs.interior = {low.begin, runs.low_count + high.end - high.begin};
  }
  return runs;
}

/// The last of the query rows [q_begin, q_begin + q_extent), of which the first exists.
GNAFORGE_HD int last_query(const Band& band, int q_begin, int q_extent) {
  return min_int(q_begin + q_extent, band.queries) - 1;
}

/// Tiles of the query rows [q_begin, q_begin + q_extent), of which the first exists.
GNAFORGE_HD AxisRuns axis_runs(const Band& band, int q_begin, int q_extent, Divisor extent) {
  return axis_runs(band, window(band, q_begin), window(band, last_query(band, q_begin, q_extent)), extent);
}

/// Of an extent that is known when the kernel runs.
GNAFORGE_HD AxisRuns axis_runs(const Band& band, int q_begin, int q_extent, int extent) {
  return axis_runs(band, q_begin, q_extent, make_divisor(extent));
}

/// The Q tiles of one KV tile along one axis.
struct AxisQueries {
  Interval visited;   ///< Query rows that see a row of the KV tile; may be empty.
  Interval interior;  ///< Q tiles from visited.begin on in which every query that exists sees every row.
  int count;
};

/// Q tiles of the rows [k_begin, k_begin + k_extent) as far as they are below `k_end`. For an axis that wraps: once for
/// the rows where they are stored, and once each for these less and plus `gap`.
GNAFORGE_HD AxisQueries axis_queries(const Band& band, int k_begin, int k_extent, int k_end, Divisor extent) {
  const int last_row = k_begin + min_int(k_extent, k_end - k_begin) - 1;
  const Interval first = transposed_window(band, k_begin), last = transposed_window(band, last_row);
  Interval any{first.begin, last.end}, all{last.begin, first.end};
  if (k_begin < band.split && band.low_begin < far_away) {  // sink rows are seen up to the last query
    any.end = band.queries;
    if (last_row >= band.split) all.end = transposed_window(band, band.split).end;
  }
  // The last tile may stick out of the queries that there are.
  if (all.end == band.queries) all.end = far_away;
  AxisQueries queries{any, {0, 0}, extent.quotient_up(max_int(any.end - any.begin, 0))};
  queries.interior = whole_tiles(all, any.begin, extent, queries.count);
  return queries;
}

GNAFORGE_HD AxisQueries axis_queries(const Band& band, int k_begin, int k_extent, int k_end, int extent) {
  return axis_queries(band, k_begin, k_extent, k_end, make_divisor(extent));
}

/// Bands as a tile source. A tile lies on one side of its band's split, and may stick out of the keys that there are:
/// `rows` doesn't.
template <class QTile_, class KvTile_>
struct BandTiles {
  using QTile = QTile_;
  using KvTile = KvTile_;
  static constexpr int rank = QTile::rank;
  using Pattern = Band;
  static constexpr bool has_sides = true;
  using List = TileList<rank, AxisRuns>;
  using Walk = TileWalk<List>;

  GNAFORGE_HD static List list(const Band (&band)[rank], const int (&q_begin)[rank]) {
    List list;
    GNAFORGE_UNROLL
    for (int d = 0; d < rank; ++d) list.axis[d] = along(band[d], q_begin[d], d);
    list.finish();
    return list;
  }

  /// What the list is along axis `d` alone.
  GNAFORGE_HD static AxisRuns along(const Band& band, int q_begin, int d) {
    return axis_runs(band, q_begin, QTile::extent(d), KvTile::divisor(d));
  }

  GNAFORGE_HD static TileKind kind(const List& list, int index) {
    return index < list.interior ? TileKind::interior : TileKind::shell;
  }

  GNAFORGE_HD static int origin(const List& list, const Walk& walk, int d) {
    return list.axis[d].origin(walk.tile[d], KvTile::extent(d));
  }

  GNAFORGE_HD static Interval rows(const List& list, const Walk& walk, int d) {
    return list.axis[d].rows(walk.tile[d], KvTile::extent(d));
  }

  GNAFORGE_HD static Interval row(const Band& band, int query) { return window(band, query); }

  GNAFORGE_HD static Interval seen(const Band& band, Interval row, int origin) {
    const Interval keys = on_side(band, row, origin);
    return {keys.begin - origin, keys.end - origin};
  }
};

}  // namespace gnaforge
