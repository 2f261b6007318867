// Compares a band with a mask that somebody else made: its tiles, rows and columns.
#pragma once

#include <cstdint>
#include <vector>

#include "gnaforge/gna/band_tiles.h"

namespace {

using namespace gnaforge;

constexpr int q_extents[] = {2, 1, 3, 5, 8, 16}, extents[] = {3, 1, 2, 4, 5, 8, 16, 32};

/// Of the first axis of a problem.
struct Report {
  std::int64_t tiles, interior, extra_tiles, ranges;
  std::int64_t errors[9];  ///< By check; the last is what rules.h says of a range.
  std::int64_t first[5];   ///< The first range with an error: queries and keys, begin and end, and keys in front.
};

inline Interval row_range(const Band& band, int query, int origin, int extent) {
  const Interval keys = on_side(band, window(band, query), origin);
  return {max_int(keys.begin - origin, 0), min_int(keys.end - origin, extent)};
}

/// A mask [queries, keys] of one dilation group.
struct Mask {
  const std::uint8_t* data;
  int queries, keys;
  bool at(int query, int key) const { return data[query * keys + key] != 0; }
};

inline void check_q_tile(const Band& band, const Mask& mask, int q_begin, int q_extent, int extent, Report& report) {
  const AxisRuns runs = axis_runs(band, q_begin, q_extent, extent);
  const int q_end = min_int(q_begin + q_extent, mask.queries);
  std::vector<int> seen(static_cast<std::size_t>(q_extent) * static_cast<std::size_t>(mask.keys)), origins;
  for (int index = 0; index < runs.count; ++index) {
    const int origin = runs.origin(index, extent);
    for (const int other : origins) report.errors[0] += other == origin;  // a tile twice
    origins.push_back(origin);
    const Interval rows = runs.rows(index, extent);
    const bool interior = index >= runs.interior.begin && index < runs.interior.end;
    bool full = true;
    Interval any{extent, 0};
    for (int q = q_begin; q < q_end; ++q) {
      const Interval range = row_range(band, q, origin, extent);
      full = full && range.begin == 0 && range.end == extent;
      for (int t = range.begin; t < range.end; ++t) {
        any = {min_int(any.begin, t), max_int(any.end, t + 1)};
        const int key = stored_row(band, origin, extent) + t;
        if (key < 0 || key >= mask.keys)
          ++report.errors[1];  // visible, but not there
        else
          ++seen[static_cast<std::size_t>((q - q_begin) * mask.keys + key)];
      }
    }
    // The rows that count are those that somebody sees, and are where they are stored.
    report.errors[2] += rows.begin - origin != any.begin || rows.end - origin != any.end;
    report.errors[3] +=
        stored_row(band, rows.begin, rows.end - rows.begin) != stored_row(band, origin, extent) + rows.begin - origin;
    report.errors[4] += interior != full;
    report.interior += interior;
    ++report.tiles;
  }
  int least = 0;  // tiles that any cover of the visible keys takes, without a seam
  for (int key = 0; key < mask.keys; ++key) {
    bool any = false;
    for (int q = q_begin; q < q_end; ++q) any = any || mask.at(q, key);
    if (any) ++least, key += extent - 1;
  }
  report.extra_tiles += runs.count - least;
  for (int q = q_begin; q < q_end; ++q)
    for (int key = 0; key < mask.keys; ++key)  // each visible pair once, others never
      report.errors[5] += seen[static_cast<std::size_t>((q - q_begin) * mask.keys + key)] != mask.at(q, key);
}

/// Images of a key: rows that stand for it, of which one is where it is stored.
inline int images(const Band& band) { return band.gap != 0 ? 1 : 0; }

inline void check_columns(const Band& band, const Mask& mask, Report& report) {
  for (int key = 0; key < mask.keys; ++key) {
    std::vector<int> seen(static_cast<std::size_t>(mask.queries));
    int parts = 0;
    for (int image = -images(band); image <= images(band); ++image) {
      const Interval queries = transposed_window(band, key + image * band.gap);
      parts += queries.begin < queries.end;
      for (int q = queries.begin; q < queries.end; ++q) ++seen[static_cast<std::size_t>(q)];
    }
    report.errors[6] += parts > 2;
    for (int q = 0; q < mask.queries; ++q) report.errors[6] += seen[static_cast<std::size_t>(q)] != mask.at(q, key);
  }
}

inline void check_kv_tile(const Band& band, const Mask& mask, int k_begin, int k_extent, int extent, Report& report) {
  const int k_end = min_int(k_begin + k_extent, mask.keys);
  std::vector<int> seen(static_cast<std::size_t>(k_extent) * static_cast<std::size_t>(mask.queries));
  for (int image = -images(band); image <= images(band); ++image) {
    const int shift = image * band.gap;
    const AxisQueries tiles = axis_queries(band, k_begin + shift, k_extent, mask.keys + shift, extent);
    for (int tile = 0; tile < tiles.count; ++tile) {
      const int origin = tiles.visited.begin + tile * extent;
      bool full = true;
      for (int key = k_begin; key < k_end; ++key) {
        const Interval queries = transposed_window(band, key + shift);
        for (int q = origin; q < origin + extent; ++q) {
          const bool sees = q >= queries.begin && q < queries.end;
          full = full && sees;
          if (sees) ++seen[static_cast<std::size_t>((key - k_begin) * mask.queries + q)];
        }
      }
      report.errors[7] += full != (tile >= tiles.interior.begin && tile < tiles.interior.end);
    }
  }
  for (int key = k_begin; key < k_end; ++key)
    for (int q = 0; q < mask.queries; ++q)
      report.errors[7] += seen[static_cast<std::size_t>((key - k_begin) * mask.queries + q)] != mask.at(q, key);
}

}  // namespace
