// How many KV tiles the Q tiles of a call visit, whatever its pattern. Host only, no STL.
#pragma once

#include "gnaforge/gna/band_tiles.h"
#include "gnaforge/pattern.h"

namespace gnaforge {

/// Exact counts along one axis, all dilation groups included. Takes time in proportion to the Q tiles of some groups.
inline TileCounts count_axis_tiles(const PatternAxis& axis, int q_extent, int kv_extent) {
  // Groups between two of these differ in nothing that counts.
  const std::int64_t bounds[] = {0, axis.q_offset % axis.dilation, (axis.q_offset + axis.q_tokens) % axis.dilation,
                                 axis.length % axis.dilation, axis.dilation};
  const Divisor kv_divisor = make_divisor(kv_extent);
  TileCounts sum{0, 0, 0};
  for (std::int64_t group = 0; group < axis.dilation;) {
    std::int64_t next = axis.dilation;
    for (const std::int64_t bound : bounds)
      if (bound > group && bound < next) next = bound;
    const Band band = band_of(axis, group);
    const auto groups = static_cast<double>(next - group);
    for (int q = 0; q < band.queries; q += q_extent) {
      const AxisRuns tiles = axis_runs(band, q, q_extent, kv_divisor);
      sum.q_tiles += groups;
      sum.visited += groups * tiles.count;
      sum.interior += groups * (tiles.interior.end - tiles.interior.begin);
    }
    group = next;
  }
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

}  // namespace gnaforge
