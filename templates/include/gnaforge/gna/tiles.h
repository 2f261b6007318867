// Which KV tiles a Q tile visits. KV tiles are laid from where the Q tile's first window begins (dynamic tiling), not
// on a fixed grid, so fewer are needed. Host and device, no torch, no STL.
#pragma once

#include <cstdint>

#include "gnaforge/gna/window.h"

namespace gnaforge {

/// The KV tiles of one Q tile along one axis. Tile j holds keys [visited.begin + j * extent, + extent).
struct AxisTiles {
  Interval visited;   ///< Keys that some query of the Q tile sees.
  Interval interior;  ///< Tiles in which every query sees every key; empty as {0, 0}.
  int count;          ///< Tiles that cover `visited`.

  /// First key of tile `index`.
  GNAFORGE_HD int origin(int index, int extent) const { return visited.begin + index * extent; }
};

/// Tiles of the queries [q_begin, q_begin + q_extent) of `axis`, a dilation group. Needs q_begin < axis.length;
/// queries at or beyond axis.length do not exist and have no say.
GNAFORGE_HD AxisTiles axis_tiles(const Axis& axis, int q_begin, int q_extent, Divisor kv_extent) {
  const Interval first = window(axis, q_begin);
  const Interval last = window(axis, min_int(q_begin + q_extent, axis.length) - 1);
  const int begin = first.begin;
  const int interior_begin = kv_extent.quotient_up(last.begin - begin);
  const int interior_end = kv_extent.quotient(first.end - begin);
  const bool any = interior_begin < interior_end;
  const int count = kv_extent.quotient_up(last.end - begin);
  return {{begin, last.end}, {any ? interior_begin : 0, any ? interior_end : 0}, count};
}

/// The KV tiles of one Q tile: the product of its axes, each of which knows `count` and `interior` as AxisTiles do.
template <int Rank, class Tiles = AxisTiles>
struct TileList {
  static constexpr int rank = Rank;
  Tiles axis[Rank];
  int count;     ///< All tiles.
  int interior;  ///< Tiles that need no mask; a walk comes by them first.

  /// Computes count and interior from axis.
  GNAFORGE_HD void finish() {
    count = 1;
    interior = 1;
    GNAFORGE_UNROLL
    for (int d = 0; d < Rank; ++d) {
      count *= axis[d].count;
      interior *= axis[d].interior.end - axis[d].interior.begin;
    }
  }
};

/// The Q tiles of one axis over all its dilation groups, numbered: groups one after the other. The first
/// length % dilation groups are one token longer than the rest.
struct AxisQTiles {
  std::int64_t long_groups, tiles_per_long, tiles_per_short;
  std::int64_t count;

  AxisQTiles() = default;
  GNAFORGE_HD AxisQTiles(const Axis& axis, int extent)
      : long_groups(axis.length % axis.dilation),
        tiles_per_long(ceil_div(axis.length / axis.dilation + 1, extent)),
        tiles_per_short(ceil_div(axis.length / axis.dilation, extent)),
        count(long_groups * tiles_per_long + (axis.dilation - long_groups) * tiles_per_short) {}

  /// Dilation group and tile within it of Q tile `index`.
  GNAFORGE_HD void locate(std::int64_t index, int& group, int& tile) const {
    const std::int64_t in_long = long_groups * tiles_per_long;
    const bool is_long = index < in_long;
    const std::int64_t per_group = is_long ? tiles_per_long : tiles_per_short;
    const std::int64_t rest = is_long ? index : index - in_long;
    group = static_cast<int>((is_long ? 0 : long_groups) + rest / per_group);
    tile = static_cast<int>(rest % per_group);
  }
};

/// A KV box of one token, of any rank: with it, count_tiles counts the keys in the box that each Q tile sees.
struct OneKey {
  GNAFORGE_HD static constexpr int extent(int) { return 1; }
  GNAFORGE_HD static constexpr Divisor divisor(int) { return divisor_of<1>(); }
};

/// Tiles that all Q tiles of a problem visit, per batch entry and head.
struct TileCounts {
  double q_tiles;
  double visited;
  double interior;
};

/// Exact counts, all dilation groups included. Separable: the product over axes of sums over Q tiles, so the cost is
/// the sum of the token extents over the tile extents, not their product.
template <class QTile, class KvTile>
GNAFORGE_HD TileCounts count_tiles(const Axis (&axis)[QTile::rank]) {
  TileCounts total{1, 1, 1};
  for (int d = 0; d < QTile::rank; ++d) {
    TileCounts sum{0, 0, 0};
    // Groups differ only by their length, and there are at most two lengths.
    const int long_groups = axis[d].length % axis[d].dilation;
    for (int kind = 0; kind < 2; ++kind) {
      const int groups = kind == 0 ? long_groups : axis[d].dilation - long_groups;
      if (groups == 0) continue;
      const Axis group = group_axis(axis[d], kind == 0 ? 0 : long_groups);
      for (int q = 0; q < group.length; q += QTile::extent(d)) {
        const AxisTiles tiles = axis_tiles(group, q, QTile::extent(d), KvTile::divisor(d));
        sum.q_tiles += groups;
        sum.visited += static_cast<double>(groups) * tiles.count;
        sum.interior += static_cast<double>(groups) * (tiles.interior.end - tiles.interior.begin);
      }
    }
    total.q_tiles *= sum.q_tiles;
    total.visited *= sum.visited;
    total.interior *= sum.interior;
  }
  return total;
}

}  // namespace gnaforge
