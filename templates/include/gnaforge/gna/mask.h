// Masks of shell tiles: which (query, key) pairs of a Q tile and a KV tile are visible. Visibility is separable, so a
// mask is a few bit fields, one per axis, combined with AND. Host and device, no torch, no STL.
#pragma once

#include "gnaforge/gna/axis.h"

namespace gnaforge {

/// Bits `begin` and above of a 32-bit word.
GNAFORGE_HD unsigned bits_from(int begin) {
  begin = max_int(begin, 0);
#if defined(__CUDA_ARCH__)
  return __funnelshift_lc(0u, ~0u, static_cast<unsigned>(begin));  // one instruction that takes 32 and more
#else
  return begin < 32 ? ~0u << begin : 0u;
#endif
}

/// Bits [begin, end) of a 32-bit word; bounds outside 0..32 are clipped.
GNAFORGE_HD unsigned range_bits(int begin, int end) { return bits_from(begin) & ~bits_from(end); }

/// What one query sees of one KV tile: a range of positions per axis, within 0 .. extent of the tile.
/// The row-major tile column c is visible iff each of its coordinates is in range.
template <class KvTile>
struct RowMask {
  static constexpr int rank = KvTile::rank;
  Interval range[rank];

  /// Visible columns 32 * index .. 32 * index + 31, one bit each; columns past the tile read 0. With a
  /// constant index all of it is shifts, ANDs and at most one product per axis.
  GNAFORGE_HD unsigned word(int index) const {
    unsigned bits = ~0u;
    GNAFORGE_UNROLL
    for (int d = 0; d < rank; ++d) bits &= axis_word(d, 32 * index);
    return bits;
  }

 private:
  /// Columns from `first` on whose coordinate along `d` is in range: runs of (end - begin) * pitch columns, which
  /// repeat with a period of extent * pitch.
  GNAFORGE_HD unsigned axis_word(int d, int first) const {
    const int pitch = KvTile::pitch(d), period = KvTile::extent(d) * pitch;
    const int begin = range[d].begin * pitch, end = range[d].end * pitch;
    if (d == 0) return range_bits(begin - first, end - first);  // does not repeat
    if (32 % period == 0) {                                     // the same in every word
      const unsigned copies = ~0u / (~0u >> (32 - period));     // 2^0 + 2^period + ...
      return range_bits(begin, end) * copies;
    }
    const int phase = first % period;
    unsigned bits = 0;
    GNAFORGE_UNROLL
    for (int start = -phase; start < 32; start += period) bits |= range_bits(start + begin, start + end);
    return bits;
  }
};

}  // namespace gnaforge
