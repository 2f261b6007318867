// How many KV tiles the Q tiles of a call visit, and how many Q tiles its KV tiles, whatever its pattern. Host only, no
// STL.
#pragma once

#include "gnaforge/gna/band_tiles.h"
#include "gnaforge/pattern.h"

namespace gnaforge {

/// Calls `visit` with the dilation groups of an axis: one of those that differ in nothing that counts, and how many.
template <class Visit>
void for_groups(const PatternAxis& axis, Visit visit) {
  // Groups between two of these differ in nothing that counts.
  const std::int64_t bounds[] = {0, axis.q_offset % axis.dilation, (axis.q_offset + axis.q_tokens) % axis.dilation,
                                 axis.length % axis.dilation, axis.dilation};
  for (std::int64_t group = 0; group < axis.dilation;) {
    std::int64_t next = axis.dilation;
    for (const std::int64_t bound : bounds)
      if (bound > group && bound < next) next = bound;
    visit(band_of(axis, group), static_cast<double>(next - group));
    group = next;
  }
}

/// Exact counts along one axis, all dilation groups included. Takes time in proportion to the Q tiles of some groups.
inline TileCounts count_axis_tiles(const PatternAxis& axis, int q_extent, int kv_extent) {
  const Divisor kv_divisor = make_divisor(kv_extent);
  TileCounts sum{0, 0, 0};
  for_groups(axis, [&](const Band& band, double groups) {
    for (int q = 0; q < band.queries; q += q_extent) {
      const AxisRuns tiles = axis_runs(band, q, q_extent, kv_divisor);
      sum.q_tiles += groups;
      sum.visited += groups * tiles.count;
      sum.interior += groups * (tiles.interior.end - tiles.interior.begin);
    }
  });
  return sum;
}

/// Columns that aren't computed of last KV tiles along the axis, added up over its Q tiles: `spared` says how many of
/// one tile, of so many rows that are seen.
template <class Spared>
double count_spared(const PatternAxis& axis, int q_extent, int kv_extent, Spared spared) {
  const Divisor kv_divisor = make_divisor(kv_extent);
  double sum = 0;
  for_groups(axis, [&](const Band& band, double groups) {
    for (int q = 0; q < band.queries; q += q_extent)
      sum += groups * spared(axis_runs(band, q, q_extent, kv_divisor).rows_of_last(kv_extent));
  });
  return sum;
}

/// And of all axes: counts along them multiply.
template <class QTile, class KvTile>
TileCounts count_tiles(const PatternAxis (&axis)[QTile::rank]) {
  TileCounts total{1, 1, 1};
  for (int d = 0; d < QTile::rank; ++d) {
    const TileCounts sum = count_axis_tiles(axis[d], QTile::extent(d), KvTile::extent(d));
    total.q_tiles *= sum.q_tiles;
    total.visited *= sum.visited;
    total.interior *= sum.interior;
  }
  return total;
}

/// The same of KV tiles, which visit Q tiles: `q_tiles` are KV tiles.
inline TileCounts count_axis_key_tiles(const PatternAxis& axis, int k_extent, int q_extent) {
  const std::int64_t keys_begin = axis.kv_sink > 0 ? 0 : axis.kv_offset, keys_end = keys_begin + axis.kv_tokens;
  const auto rest = [&](std::int64_t token) { return (token % axis.dilation + axis.dilation) % axis.dilation; };
  const std::int64_t bounds[] = {rest(axis.q_offset), rest(axis.q_offset + axis.q_tokens),
                                 rest(keys_begin),    rest(keys_end),
                                 rest(axis.length),   axis.dilation};
  const Divisor q_divisor = make_divisor(q_extent);
  TileCounts sum{0, 0, 0};
  for (std::int64_t group = 0; group < axis.dilation;) {
    std::int64_t next = axis.dilation;
    for (const std::int64_t bound : bounds)
      if (bound > group && bound < next) next = bound;
    const Band band = band_of(axis, group);
    const auto groups = static_cast<double>(next - group);
    const int keys =
        position_in_group(keys_end, group, axis.dilation) - position_in_group(keys_begin, group, axis.dilation);
    const auto sink = static_cast<int>(axis.kv_sink);
    struct Place {
      int begin, end, shift;
    };
    // Rows of stored keys: where they are, and on an axis that wraps a grid away; or the grid's first, and the others.
    const Place wrapped[] = {{0, keys, 0}, {0, keys, -band.gap}, {0, keys, band.gap}};
    const Place apart[] = {{0, sink, 0}, {sink, keys, band.gap}};
    const bool splits = sink > 0 && band.gap != 0;
    const Place* const places = splits ? apart : wrapped;
    const int count = splits ? 2 : band.gap != 0 ? 3 : 1;
    for (int k = 0; k < keys; k += k_extent) {
      sum.q_tiles += groups;
      for (int i = 0; i < count; ++i) {
        const auto [first, last, shift] = places[i];
        const int begin = max_int(k, first), end = min_int(k + k_extent, last);
        if (begin >= end) continue;
        const AxisQueries tiles = axis_queries(band, begin + shift, end - begin, end + shift, q_divisor);
        sum.visited += groups * tiles.count;
        if (end - begin == min_int(k_extent, keys - k))
          sum.interior += groups * (tiles.interior.end - tiles.interior.begin);
      }
    }
    group = next;
  }
  return sum;
}

/// And of all axes.
template <class KvTile, class QTile>
TileCounts count_key_tiles(const PatternAxis (&axis)[KvTile::rank]) {
  TileCounts total{1, 1, 1};
  for (int d = 0; d < KvTile::rank; ++d) {
    const TileCounts sum = count_axis_key_tiles(axis[d], KvTile::extent(d), QTile::extent(d));
    total.q_tiles *= sum.q_tiles;
    total.visited *= sum.visited;
    total.interior *= sum.interior;
  }
  return total;
}

}  // namespace gnaforge
