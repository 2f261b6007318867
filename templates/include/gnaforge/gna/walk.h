// The tiles of a TileList one after the other, without divisions. Host and device, no torch, no STL.
#pragma once

#include "gnaforge/gna/tiles.h"

namespace gnaforge {

/// Walks the interior tiles, or the rest of them (the shell), each in row-major order.
template <int Rank>
struct TileWalk {
  int tile[Rank];

  GNAFORGE_HD void begin_interior(const TileList<Rank>& list) {
    GNAFORGE_UNROLL
    for (int d = 0; d < Rank; ++d) tile[d] = list.axis[d].interior.begin;
  }

  GNAFORGE_HD void next_interior(const TileList<Rank>& list) {
    GNAFORGE_UNROLL
    for (int d = Rank - 1; d >= 0; --d) {
      if (++tile[d] < list.axis[d].interior.end) return;
      tile[d] = list.axis[d].interior.begin;
    }
  }

  /// Needs a list with list.interior < list.count.
  GNAFORGE_HD void begin_shell(const TileList<Rank>& list) {
    GNAFORGE_UNROLL
    for (int d = 0; d < Rank; ++d) tile[d] = 0;
    skip_interior(list);
  }

  GNAFORGE_HD void next_shell(const TileList<Rank>& list) {
    ++tile[Rank - 1];
    carry(list);
    skip_interior(list);
  }

  /// First key of the tile along axis `d`.
  template <class KvTile>
  GNAFORGE_HD int origin(const TileList<Rank>& list, int d) const {
    return list.axis[d].visited.begin + tile[d] * KvTile::extent(d);
  }

 private:
  GNAFORGE_HD void carry(const TileList<Rank>& list) {
    GNAFORGE_UNROLL
    for (int d = Rank - 1; d > 0; --d) {
      if (tile[d] < list.axis[d].count) return;
      tile[d] = 0;
      ++tile[d - 1];
    }
  }

  /// Past the end of a line of interior tiles, and of the lines after it; stops at the end of the list.
  GNAFORGE_HD void skip_interior(const TileList<Rank>& list) {
    for (;;) {
      bool inside = true;
      GNAFORGE_UNROLL
      for (int d = 0; d < Rank; ++d)
        inside = inside && tile[d] >= list.axis[d].interior.begin && tile[d] < list.axis[d].interior.end;
      if (!inside) return;
      tile[Rank - 1] = list.axis[Rank - 1].interior.end;
      carry(list);
    }
  }
};

}  // namespace gnaforge
