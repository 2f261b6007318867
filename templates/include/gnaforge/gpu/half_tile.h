// A Q tile cut into two boxes of tokens, for kernels that compute it in two halves of padded rows. Host and device.
#pragma once

#include "gnaforge/gna/axis.h"

namespace gnaforge::gpu {

constexpr int halves = 2;

/// One half, of at most `Rows` tokens, cut across the axis where halves are smallest. Across an odd extent both halves
/// hold the tokens in the middle: both compute and store them, with the same result (the log-sum-exp only the first).
template <class QTile, int Rows>
struct HalfTile {
  static constexpr int rank = QTile::rank;

  GNAFORGE_HD static constexpr int volume_across(int axis) {
    return QTile::volume / QTile::extent(axis) * ceil_div(QTile::extent(axis), halves);
  }
  GNAFORGE_HD static constexpr int cut_axis() {
    int best = 0;
    for (int d = 1; d < rank; ++d)
      if (volume_across(d) < volume_across(best)) best = d;
    return best;
  }

  static constexpr int rows = Rows;
  static constexpr int axis = cut_axis();
  static constexpr int volume = volume_across(axis);
  static constexpr int offset = QTile::extent(axis) - ceil_div(QTile::extent(axis), halves);  ///< Of the second half.

  static constexpr int common = ceil_div(QTile::extent(axis), halves) - offset;  ///< Along the axis, of both halves.

  GNAFORGE_HD static constexpr int extent(int d) {
    return d == axis ? ceil_div(QTile::extent(d), halves) : QTile::extent(d);
  }
  GNAFORGE_HD static constexpr int pitch(int d) {
    int elements = 1;
    for (int inner = d + 1; inner < rank; ++inner) elements *= extent(inner);
    return elements;
  }
  /// Where half `half` begins along axis `d`, from the tile's first query.
  GNAFORGE_HD static constexpr int begin(int half, int d) { return d == axis ? half * offset : 0; }

  static_assert(volume <= Rows, "a half of the Q tile has more tokens than rows");
};

}  // namespace gnaforge::gpu
