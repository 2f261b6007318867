// A tile source: which KV tiles a Q tile visits, in which order, and what a row sees of each. Kernels are written on
// this concept, and each family names its source once, as TileSource in its layout. Host and device, no torch, no STL.
//
//   struct Source {
//     using QTile, KvTile;
//     static constexpr int rank;
//     using Pattern;                                         // what is known of an axis: Axis, or Band
//     static constexpr bool has_sides;                       // whether there are tiles that are shell_below
//     using List;                                            // KV tiles of one Q tile: `count`, first `interior` ones
//     using Walk;                                            // a place among them: begin(list), step(list, next index)
//     static List list(pattern, q_begin);
//     static along(pattern, q_begin, int d);                 // its part of axis d, for those who share out the axes
//     static TileKind kind(const List&, int index);          // of the index-th tile of a walk
//     static int origin(const List&, const Walk&, int d);    // its first key along axis d,
//     static Interval rows(const List&, const Walk&, int d); // and those of its keys that some row sees
//     static Interval row(pattern, int query);               // keys that a row sees along an axis: once per row
//     static Interval seen(pattern, Interval row, origin);   // those of a tile, counted from its first; not clipped
//   };
//
// Along each axis a row sees one interval of a tile, whatever the source: a sink and a window, or both sides of a seam,
// are in different tiles. BandTiles (band_tiles.h) asks one question more: where a copy begins
// (stored_row). Listed boxes fit with a walk over numbers, a kind of their own and interior 0: nobody but the walk
// relies on an order of kinds.
#pragma once

#include "gnaforge/gna/mask.h"
#include "gnaforge/gna/walk.h"

namespace gnaforge {

/// What is to be done with a KV tile. Other sources have further kinds.
enum class TileKind : int {
  interior,     ///< No mask: every row sees every key.
  shell,        ///< A mask by what rows see.
  part,         ///< The first columns only, the same ones for every row.
  shell_below,  ///< As shell, below the split of some axis: see gna/band.h.
};

/// GNA's windows as a tile source.
template <class QTile_, class KvTile_>
struct WindowTiles {
  using QTile = QTile_;
  using KvTile = KvTile_;
  static constexpr int rank = QTile::rank;
  using Pattern = Axis;
  static constexpr bool has_sides = false;
  using List = TileList<rank>;
  using Walk = TileWalk<List>;

  /// `axis` holds one dilation group per axis; `q_begin` is the Q tile's first query.
  GNAFORGE_HD static List list(const Axis (&axis)[rank], const int (&q_begin)[rank]) {
    List list;
    GNAFORGE_UNROLL
    for (int d = 0; d < rank; ++d) list.axis[d] = along(axis[d], q_begin[d], d);
    list.finish();
    return list;
  }

  /// What the list is along axis `d` alone.
  GNAFORGE_HD static AxisTiles along(const Axis& axis, int q_begin, int d) {
    return axis_tiles(axis, q_begin, QTile::extent(d), KvTile::divisor(d));
  }

  GNAFORGE_HD static TileKind kind(const List& list, int index) {
    return index < list.interior ? TileKind::interior : TileKind::shell;
  }

  GNAFORGE_HD static int origin(const List& list, const Walk& walk, int d) {
    return list.axis[d].origin(walk.tile[d], KvTile::extent(d));
  }

  GNAFORGE_HD static Interval rows(const List& list, const Walk& walk, int d) {
    const int begin = origin(list, walk, d);
    return {begin, min_int(begin + KvTile::extent(d), list.axis[d].visited.end)};
  }

  GNAFORGE_HD static Interval row(const Axis& axis, int query) { return window(axis, query); }

  GNAFORGE_HD static Interval seen(const Axis&, Interval row, int origin) {
    return {row.begin - origin, row.end - origin};
  }
};

}  // namespace gnaforge
