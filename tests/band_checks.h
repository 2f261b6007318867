// Compares a band with a mask that somebody else made: its tiles, rows and columns.
#pragma once

#include <cstdint>
#include <vector>

#include "gnaforge/gna/query_runs.h"

namespace {

using namespace gnaforge;

constexpr int q_extents[] = {2, 1, 3, 5, 8, 16}, extents[] = {3, 1, 2, 4, 5, 8, 16, 32};
constexpr int most_rows = 128;

__extension__ typedef unsigned __int128 Bits;  ///< Keys that a query sees, or queries that see a key.

/// Ones from `begin` to `end`, as far as there are bits.
constexpr Bits ones(int begin, int end) {
  begin = clamp_int(begin, 0, most_rows);
  end = clamp_int(end, 0, most_rows);
  if (begin >= end) return 0;
  return (~Bits{0} >> (most_rows - (end - begin))) << begin;
}

/// Of the first axis of a problem.
struct Report {
  std::int64_t tiles, interior, extra_tiles, ranges;
  std::int64_t errors[9];  ///< By check; the last is what rules.h says of a range.
  std::int64_t first[5];   ///< The first range with an error: queries and keys, begin and end, and keys in front.
};

/// A mask [queries, keys] of one dilation group, at most most_rows each.
struct Mask {
  int queries = 0, keys = 0;
  Bits row[most_rows], column[most_rows];

  void add_row(Bits seen) {
    for (int key = 0; key < keys; ++key) {
      if (queries == 0) column[key] = 0;
      column[key] |= (seen >> key & 1) << queries;
    }
    row[queries++] = seen;
  }
};

inline Interval row_range(const Band& band, int query, int origin, int extent) {
  const Interval keys = on_side(band, window(band, query), origin);
  return {max_int(keys.begin - origin, 0), min_int(keys.end - origin, extent)};
}

/// A Q tile of at most 16 queries.
inline void check_q_tile(const Band& band, const Mask& mask, int q_begin, int q_extent, int extent, Report& report) {
  const AxisRuns runs = axis_runs(band, q_begin, q_extent, extent);
  const int q_end = min_int(q_begin + q_extent, mask.queries);
  Bits seen[16] = {}, anyone = 0;
  int origins[2 * most_rows];
  if (runs.count < 0 || runs.count > 2 * most_rows) {
    ++report.errors[0];
    return;
  }
  for (int index = 0; index < runs.count; ++index) {
    const int origin = origins[index] = runs.origin(index, extent), stored = stored_row(band, origin, extent);
    for (int other = 0; other < index; ++other) report.errors[0] += origins[other] == origin;  // a tile twice
    const Interval rows = runs.rows(index, extent);
    const bool interior = index >= runs.interior.begin && index < runs.interior.end;
    bool full = true;
    Interval any{extent, 0};
    for (int q = q_begin; q < q_end; ++q) {
      const Interval range = row_range(band, q, origin, extent);
      full = full && range.begin == 0 && range.end == extent;
      if (range.begin >= range.end) continue;
      any = {min_int(any.begin, range.begin), max_int(any.end, range.end)};
      const Interval keys{stored + range.begin, stored + range.end};
      report.errors[1] += keys.begin < 0 || keys.end > mask.keys;  // visible, but not there
      const Bits now = ones(keys.begin, keys.end);
      report.errors[5] += (seen[q - q_begin] & now) != 0;  // a visible pair twice
      seen[q - q_begin] |= now;
    }
    // The rows that count are those that somebody sees, and are where they are stored.
    report.errors[2] += rows.begin - origin != any.begin || rows.end - origin != any.end;
    report.errors[3] += stored_row(band, rows.begin, rows.end - rows.begin) != stored + rows.begin - origin;
    report.errors[4] += interior != full;
    report.interior += interior;
    ++report.tiles;
  }
  for (int q = q_begin; q < q_end; ++q) {
    report.errors[5] += seen[q - q_begin] != mask.row[q];
    anyone |= mask.row[q];
  }
  int least = 0;  // tiles that any cover of the visible keys takes, without a seam
  for (int key = 0; key < mask.keys; ++key)
    if (anyone >> key & 1) ++least, key += extent - 1;
  report.extra_tiles += runs.count - least;
}

/// Images of a key: rows that stand for it, of which one is where it is stored.
inline int images(const Band& band) { return band.gap != 0 ? 1 : 0; }

inline void check_columns(const Band& band, const Mask& mask, Report& report) {
  for (int key = 0; key < mask.keys; ++key) {
    Bits seen = 0;
    int parts = 0;
    for (int image = -images(band); image <= images(band); ++image) {
      const Interval queries = transposed_window(band, key + image * band.gap);
      const Bits now = ones(queries.begin, queries.end);
      parts += now != 0;
      report.errors[6] += (seen & now) != 0 || queries.end > mask.queries;
      seen |= now;
    }
    report.errors[6] += parts > 2 || seen != mask.column[key];
  }
}

inline void check_kv_tile(const Band& band, const Mask& mask, int k_begin, int k_extent, int extent, Report& report) {
  const int k_end = min_int(k_begin + k_extent, mask.keys);
  Bits seen[most_rows] = {};
  for (int image = -images(band); image <= images(band); ++image) {
    const int shift = image * band.gap;
    const AxisQueries tiles = axis_queries(band, k_begin + shift, k_extent, mask.keys + shift, extent);
    for (int tile = 0; tile < tiles.count; ++tile) {
      const int origin = tiles.visited.begin + tile * extent;
      const Bits all = ones(origin, min_int(origin + extent, mask.queries));
      bool full = true, any = false;
      for (int key = k_begin; key < k_end; ++key) {
        const Interval queries = transposed_window(band, key + shift);
        const Bits now = ones(queries.begin, queries.end) & all;
        full = full && now == all;
        any = any || now != 0;
        report.errors[7] += (seen[key - k_begin] & now) != 0;
        seen[key - k_begin] |= now;
      }
      report.errors[7] += !any || full != (tile >= tiles.interior.begin && tile < tiles.interior.end);
    }
  }
  for (int key = k_begin; key < k_end; ++key) report.errors[7] += seen[key - k_begin] != mask.column[key];
}

/// Runs hold each visible pair once; tiles are interior where all queries that exist see all keys that exist.
inline void check_query_runs(const Band& band, const Mask& mask, int k_begin, int k_extent, int extent,
                             Report& report) {
  const int k_end = min_int(k_begin + k_extent, mask.keys);
  const QueryRuns runs = query_runs(band, k_begin, k_extent, mask.keys, make_divisor(extent));
  Bits seen[most_rows] = {};
  for (int tile = 0; tile < runs.count; ++tile) {
    const int origin = runs.origin(tile, extent), run = runs.run(tile);
    const Bits all = ones(origin, min_int(origin + extent, mask.queries));
    bool full = true, any = false;
    for (int key = k_begin; key < k_end; ++key) {
      const Interval queries = queries_of_key(band, key, run);
      const Bits now = ones(queries.begin, queries.end) & all;
      full = full && now == all;
      any = any || now != 0;
      report.errors[7] += (seen[key - k_begin] & now) != 0;
      seen[key - k_begin] |= now;
    }
    report.errors[7] += !any || full != (tile >= runs.interior.begin && tile < runs.interior.end);
  }
  for (int key = k_begin; key < k_end; ++key) report.errors[7] += seen[key - k_begin] != mask.column[key];
}

}  // namespace
