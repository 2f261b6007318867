// KV tiles of which only the first columns are computed: the last ones along the first axis, whose rows come first in a
// box, where nobody sees the others. Host and device.
#pragma once

#include "gnaforge/gna/axis.h"

namespace gnaforge::sm100 {

/// How many columns of a KV tile are computed is known when the kernel runs. It is one of few numbers, for each of
/// which products and softmax have code: all, or words of 32 columns with which some rows along the first axis begin.
/// Boxes of one row along it, or of one word, have one number, and no code for it.
template <class KvTile>
struct ShortTiles {
  static constexpr int all = KvTile::volume;
  static constexpr int most = 64;                      ///< Beyond, a number gains too little for its time to compile.
  static constexpr int row = all / KvTile::extent(0);  ///< Columns of a row along the first axis.

  GNAFORGE_HD static constexpr int whole_words(int columns) { return min_int(ceil_div(columns, 32) * 32, all); }

  /// The largest number below another one; 0 if there is none.
  GNAFORGE_HD static constexpr int below(int columns) {
    int found = 0;
    for (int rows = 1; rows < KvTile::extent(0); ++rows)
      if (whole_words(rows * row) < min_int(columns, most + 1)) found = whole_words(rows * row);
    return found;
  }

  static constexpr bool any = below(all) > 0;

  /// The smallest number that is enough for so many columns.
  template <int Enough = all>
  GNAFORGE_HD static constexpr int enough(int columns) {
    constexpr int fewer = below(Enough);
    if constexpr (fewer > 0)
      if (columns <= fewer) return enough<fewer>(columns);
    return Enough;
  }
};

}  // namespace gnaforge::sm100
