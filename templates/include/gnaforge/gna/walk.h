// The tiles of a TileList one after the other, without divisions. Host and device, no torch, no STL.
#pragma once

#include "gnaforge/gna/tiles.h"

namespace gnaforge {

/// A place among the tiles of a TileList: first the interior tiles, then the rest (the shell), each in row-major order.
template <class List>
struct TileWalk {
  static constexpr int rank = List::rank;
  int tile[rank];  ///< Its index along each axis.

  GNAFORGE_HD void begin(const List& list) {
    // Without interior tiles there are none to skip.
    GNAFORGE_UNROLL
    for (int d = 0; d < rank; ++d) tile[d] = list.interior > 0 ? list.axis[d].interior.begin : 0;
  }

  /// To the shell's first tile, if there is one.
  GNAFORGE_HD void begin_shell(const List& list) {
    GNAFORGE_UNROLL
    for (int d = 0; d < rank; ++d) tile[d] = 0;
    skip_interior(list);
  }

  /// From tile `index` - 1 to tile `index`, which exists.
  GNAFORGE_HD void step(const List& list, int index) {
    if (index < list.interior)
      next_interior(list);
    else if (index == list.interior)
      begin_shell(list);
    else
      next_shell(list);
  }

 private:
  GNAFORGE_HD void next_interior(const List& list) {
    GNAFORGE_UNROLL
    for (int d = rank - 1; d >= 0; --d) {
      if (++tile[d] < list.axis[d].interior.end) return;
      tile[d] = list.axis[d].interior.begin;
    }
  }

  GNAFORGE_HD void next_shell(const List& list) {
    ++tile[rank - 1];
    carry(list);
    skip_interior(list);
  }

  GNAFORGE_HD void carry(const List& list) {
    GNAFORGE_UNROLL
    for (int d = rank - 1; d > 0; --d) {
      if (tile[d] < list.axis[d].count) return;
      tile[d] = 0;
      ++tile[d - 1];
    }
  }

  /// Past the end of a line of interior tiles, and of the lines after it; stops at the end of the list.
  GNAFORGE_HD void skip_interior(const List& list) {
    for (;;) {
      bool inside = true;
      GNAFORGE_UNROLL
      for (int d = 0; d < rank; ++d)
        inside = inside && tile[d] >= list.axis[d].interior.begin && tile[d] < list.axis[d].interior.end;
      if (!inside) return;
      tile[rank - 1] = list.axis[rank - 1].interior.end;
      carry(list);
    }
  }
};

}  // namespace gnaforge
