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

}  // namespace gnaforge
