// Masks of shell tiles: which (query, key) pairs of a Q tile and a KV tile are visible. Visibility is separable, so a
// mask is a few bit fields, one per axis, combined with AND. Host and device, no torch, no STL.
#pragma once

#include "gnaforge/window.h"

namespace gnaforge {

/// Bits [begin, end) of a 32-bit word; bounds outside 0..32 are clipped.
GNAFORGE_HD constexpr unsigned range_bits(int begin, int end) {
  begin = max_int(begin, 0);
  end = min_int(end, 32);
  if (begin >= end) return 0;
  return (~0u >> (32 - (end - begin))) << begin;
}

/// What one query sees of one KV tile: a range of positions per axis, within 0 .. extent of the tile.
/// The row-major tile column c is visible iff each of its coordinates is in range.
template <class KvTile>
struct RowMask {
  Interval range[KvTile::rank];

  /// Visible columns 32 * index .. 32 * index + 31, one bit each; columns past the tile read 0.
  GNAFORGE_HD unsigned word(int index) const {
    constexpr int inner = KvTile::rank - 1;
    constexpr int line = KvTile::extent(inner);
    const int begin = 32 * index;
    const int end = min_int(begin + 32, KvTile::volume);
    unsigned bits = 0;
    // One step per line of the box that crosses this word; with a constant index all of it folds to shifts and ANDs.
    for (int column = begin; column < end; column += line - column % line) {
      const int x = column % line;
      const unsigned visible = range_bits(range[inner].begin - x, range[inner].end - x);
      if (line_visible(column / line)) bits |= visible << (column - begin);
    }
    return bits;
  }

 private:
  GNAFORGE_HD bool line_visible(int index) const {
    bool visible = true;
    for (int d = KvTile::rank - 2; d >= 0; --d) {
      const int position = index % KvTile::extent(d);
      index /= KvTile::extent(d);
      visible = visible && position >= range[d].begin && position < range[d].end;
    }
    return visible;
  }
};

/// Mask row of the query at `query` for the KV tile whose first key is `origin`; positions within dilation groups.
template <class KvTile>
GNAFORGE_HD RowMask<KvTile> row_mask(const Axis (&axis)[KvTile::rank], const int (&query)[KvTile::rank],
                                     const int (&origin)[KvTile::rank]) {
  RowMask<KvTile> mask;
  for (int d = 0; d < KvTile::rank; ++d) {
    const Interval keys = window(axis[d], query[d]);
    mask.range[d] = {max_int(keys.begin - origin[d], 0), min_int(keys.end - origin[d], KvTile::extent(d))};
  }
  return mask;
}

/// A set of the rows of a Q tile, one bit per row, row-major.
template <class QTile>
struct RowSet {
  static constexpr int words = (QTile::volume + 63) / 64;
  unsigned long long word[words];
};

/// The rows of a Q tile whose coordinate along `axis` is `position`.
template <class QTile>
GNAFORGE_HD constexpr RowSet<QTile> rows_at(int axis, int position) {
  RowSet<QTile> set{};
  const int pitch = QTile::pitch(axis);
  for (int row = 0; row < QTile::volume; ++row)
    if (row / pitch % QTile::extent(axis) == position) set.word[row / 64] |= 1ull << (row % 64);
  return set;
}

/// The mask read the other way: for each of the keys [k_begin, k_begin + count) of axis `d`, the rows of the Q tile at
/// q_begin that see it along this axis. A key of the tile is visible to the AND of its coordinates' sets.
/// Used where lanes hold queries (cpu).
template <class QTile>
GNAFORGE_HD void rows_that_see(const Axis& axis, int d, int q_begin, int k_begin, int count, RowSet<QTile>* rows) {
  for (int k = 0; k < count; ++k) rows[k] = RowSet<QTile>{};
  for (int position = 0; position < QTile::extent(d) && q_begin + position < axis.length; ++position) {
    const Interval keys = window(axis, q_begin + position);
    const RowSet<QTile> at = rows_at<QTile>(d, position);
    const int end = min_int(keys.end - k_begin, count);
    for (int k = max_int(keys.begin - k_begin, 0); k < end; ++k)
      for (int w = 0; w < RowSet<QTile>::words; ++w) rows[k].word[w] |= at.word[w];
  }
}

}  // namespace gnaforge
