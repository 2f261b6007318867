// Masks of shell tiles read the other way, for kernels whose lanes hold queries: per key, the rows of the Q tile that
// see it. Host only.
#pragma once

#include "gnaforge/gna/band_tiles.h"

namespace gnaforge::cpu {

/// A set of the rows of a Q tile, one bit per row, row-major.
template <class QTile>
struct RowSet {
  static constexpr int words = (QTile::volume + 63) / 64;
  unsigned long long word[words];
};

/// The rows of a Q tile by coordinate, computed at compile time: at[d][p] are those at position p along axis d.
template <class QTile>
struct RowTable {
  static constexpr int max_extent() {
    int extent = 1;
    for (int d = 0; d < QTile::rank; ++d) extent = max_int(extent, QTile::extents[d]);
    return extent;
  }
  RowSet<QTile> at[QTile::rank][max_extent()];

  constexpr RowTable() : at{} {
    for (int d = 0; d < QTile::rank; ++d)
      for (int row = 0; row < QTile::volume; ++row)
        at[d][row / QTile::pitch(d) % QTile::extents[d]].word[row / 64] |= 1ull << (row % 64);
  }
};
template <class QTile>
inline constexpr RowTable<QTile> row_table{};

/// What each position of a Q tile sees along each axis; empty for positions past the end of the dilation group.
template <class Source>
struct TileRows {
  using QTile = typename Source::QTile;
  const Band (&band)[QTile::rank];
  Interval at[QTile::rank][RowTable<QTile>::max_extent()];

  /// For the Q tile at `q_begin` of the bands, which must outlive this.
  TileRows(const Band (&of)[QTile::rank], const int (&q_begin)[QTile::rank]) : band(of) {
    for (int d = 0; d < QTile::rank; ++d)
      for (int p = 0; p < QTile::extents[d]; ++p)
        at[d][p] = q_begin[d] + p < band[d].queries ? Source::row(band[d], q_begin[d] + p) : no_window;
  }

  /// For each of the `count` keys from `origin` on of axis `d`, the rows that see it along this axis. A key of a tile
  /// is visible to the AND of its coordinates' sets.
  void rows_that_see(int d, int origin, int count, RowSet<QTile>* rows) const {
    for (int k = 0; k < count; ++k) rows[k] = RowSet<QTile>{};
    for (int p = 0; p < QTile::extents[d]; ++p) {
      const Interval seen = Source::seen(band[d], at[d][p], origin);
      const int end = min_int(seen.end, count);
      for (int k = max_int(seen.begin, 0); k < end; ++k)
        for (int w = 0; w < RowSet<QTile>::words; ++w) rows[k].word[w] |= row_table<QTile>.at[d][p].word[w];
    }
  }
};

}  // namespace gnaforge::cpu
