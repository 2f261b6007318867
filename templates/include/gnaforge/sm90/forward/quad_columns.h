// The columns of a KV tile that one thread holds: of each group of 8 columns of wgmma's accumulator, threads of a quad
// hold two each, the same two in all groups. So 128 columns are 32 bits. Visibility is separable: a row sees a column
// if along each axis its coordinate is below where the row's keys end and not below where they begin. Which of a
// thread's columns are below a coordinate is in a table, or for one axis a sum. Host and device.
#pragma once

#include "gnaforge/abi.h"
#include "gnaforge/gna/axis.h"

namespace gnaforge::sm90 {

template <class KvTile>
struct QuadColumns {
  static constexpr int rank = KvTile::rank;
  static constexpr int words = ceil_div(KvTile::volume, 128);

  /// Bytes of one coordinate's entry: [thread of the quad][word].
  static constexpr int entry_bytes = 4 * 4 * words;

  /// Coordinates along `axis` that have an entry: all where a row's keys can begin or end, clipped to the tile.
  GNAFORGE_HD static constexpr int coordinates(int axis) { return KvTile::extent(axis) + 1; }

  /// Where the entries of an axis begin; behind the last one's, how long the table is.
  GNAFORGE_HD static constexpr int table_offset(int axis) {  // without a loop, which device code would run
    return entry_bytes *
           ((axis > 0 ? coordinates(0) : 0) + (axis > 1 ? coordinates(1) : 0) + (axis > 2 ? coordinates(2) : 0));
  }
  static constexpr int table_bytes = rank == 1 ? 0 : table_offset(rank);

  /// In front of the table there are entries for columns of a part of a tile; the producer writes them.
  static constexpr int parts = rank == 1 ? 0 : GNAFORGE_MAX_EXTRA;
  GNAFORGE_HD static constexpr int part_entry(int piece) { return piece - parts; }

  /// A word of the table: columns whose coordinate along `axis` is below `end`, of the thread `quad` of a quad.
  GNAFORGE_HD static unsigned below(int axis, int end, int quad, int word) {
    unsigned bits = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll 4
#endif
    for (int bit = 0; bit < 32; ++bit) {
      const int column = 8 * (16 * word + bit / 2) + 2 * quad + bit % 2;
      const int coordinate = column / KvTile::pitch(axis) % KvTile::extent(axis);
      if (column < KvTile::volume && coordinate < end) bits |= 1u << bit;
    }
    return bits;
  }

  /// How many of a thread's columns are among the first `end`; less than 0 or more than there are, outside of the tile.
  GNAFORGE_HD static int count_below(int end, int quad) {
    const int from_first = end - 2 * quad;
    return 2 * (from_first >> 3) + min_int(from_first & 7, 2);
  }

  GNAFORGE_HD static int clip(int axis, int coordinate) {
    return max_int(min_int(coordinate, KvTile::extent(axis)), 0);
  }
};

}  // namespace gnaforge::sm90
