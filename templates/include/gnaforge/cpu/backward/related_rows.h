// Which rows a tile's lanes have to do with: the keys that queries see, or the queries that see keys. Host only.
#pragma once

#include "gnaforge/cpu/row_set.h"

namespace gnaforge::cpu {

/// A part of the rows along one axis, in which they lie in memory as they are counted.
template <int Extent>
struct RowPart {
  Interval
      at[Extent];  ///< Of each position of the tile, the rows that it has to do with; empty for those past the end.
  Interval any;    ///< The hull of these.
  Interval all;    ///< The rows that all positions have in common; may be empty.
  int shift;       ///< A row is stored so many rows later.
};

/// All parts of an axis: none has a row in common with another, as far as the tile has to do with it.
template <int Extent>
struct AxisRows {
  RowPart<Extent> part[3];
  int count;

  /// For the queries [begin, begin + Extent) of a band: keys before the grid's first, up to the split, and from it on.
  static AxisRows keys_of(const Band& band, int begin) {
    const Interval parts[] = {{-far_away, min_int(0, band.split)}, {0, band.split}, {band.split, far_away}};
    const int shifts[] = {band.gap, 0, -band.gap};
    AxisRows rows;
    rows.count = 0;
    for (int i = 0; i < 3; ++i) {
      if (parts[i].begin >= parts[i].end) continue;
      rows.add(shifts[i], begin, band.queries, [&](int query) {
        const Interval seen = on_side(band, window(band, query), parts[i].begin);
        return Interval{max_int(seen.begin, parts[i].begin), min_int(seen.end, parts[i].end)};
      });
    }
    return rows;
  }

  /// All of `tokens` queries.
  static AxisRows all_queries(int tokens) {
    AxisRows rows;
    rows.count = 0;
    rows.add(0, 0, Extent, [&](int) { return Interval{0, tokens}; });
    return rows;
  }

  /// For the stored keys [begin, begin + Extent) of `keys`: the queries that see them. Up to three rows are stored in
  /// one place: see Band::gap.
  static AxisRows queries_of(const Band& band, int begin, int keys) {
    AxisRows rows;
    rows.count = 0;
    for (int image = band.gap == 0 ? 0 : -1; image <= (band.gap == 0 ? 0 : 1); ++image)
      rows.add(0, begin, keys, [&](int key) {
        const int row = key + image * band.gap;
        const bool stored_here = band.gap == 0 || image == (row < 0 ? -1 : row >= band.split ? 1 : 0);
        return stored_here && row >= min_int(band.begin_min, 0) ? transposed_window(band, row) : no_window;
      });
    return rows;
  }

 private:
  template <class RowsOf>
  void add(int shift, int begin, int end, const RowsOf& rows_of) {
    RowPart<Extent>& next = part[count];
    next.shift = shift;
    next.any = {far_away, -far_away};
    next.all = {-far_away, far_away};
    for (int p = 0; p < Extent; ++p) {
      next.at[p] = no_window;
      if (begin + p >= end) continue;
      const Interval own = rows_of(begin + p);
      next.all = {max_int(next.all.begin, own.begin), min_int(next.all.end, own.end)};
      if (own.begin >= own.end) continue;
      next.at[p] = own;
      next.any = {min_int(next.any.begin, own.begin), max_int(next.any.end, own.end)};
    }
    if (next.any.begin < next.any.end) ++count;
  }
};

/// The positions of a tile along axis `d`, as a set of its lanes, that have to do with a row.
template <class Tile, int Extent>
RowSet<Tile> lanes_of(const RowPart<Extent>& part, int d, int row) {
  RowSet<Tile> set{};
  // Word by word: g++ 12 vectorises the other order of these loops wrongly.
  for (int w = 0; w < RowSet<Tile>::words; ++w) {
    unsigned long long word = 0;
    for (int p = 0; p < Tile::extents[d]; ++p)
      if (row >= part.at[p].begin && row < part.at[p].end) word |= row_table<Tile>.at[d][p].word[w];
    set.word[w] = word;
  }
  return set;
}

}  // namespace gnaforge::cpu
