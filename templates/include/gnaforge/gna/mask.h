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

/// Bits `from` .. `from` + 31 of 64, whose low and high words these are; `from` is 0 .. 31.
GNAFORGE_HD unsigned bits_at(unsigned low, unsigned high, int from) {
#if defined(__CUDA_ARCH__)
  return __funnelshift_r(low, high, static_cast<unsigned>(from));
#else
  return from == 0 ? low : low >> from | high << (32 - from);
#endif
}

/// Bits `begin` and above of 64, where `begin` is not negative.
GNAFORGE_HD unsigned long long bits_from_of_64(int begin) {
#if defined(__CUDA_ARCH__)
  unsigned long long bits;
  asm("shl.b64 %0, %1, %2;" : "=l"(bits) : "l"(~0ull), "r"(begin));  // takes 64 and more, as `<<` doesn't
  return bits;
#else
  return begin < 64 ? ~0ull << begin : 0;
#endif
}

/// Bits `begin` and above of N words, the lowest first.
template <int N>
GNAFORGE_HD void set_bits_from(int begin, unsigned (&words)[N]) {
  GNAFORGE_UNROLL
  for (int w = 0; w < N; w += 2) {
    if (w + 1 < N) {  // an instruction for each word, and one for both
      const unsigned long long both = bits_from_of_64(max_int(begin - 32 * w, 0));
      words[w] = static_cast<unsigned>(both);
      words[w + 1] = static_cast<unsigned>(both >> 32);
    } else {
      words[w] = bits_from(begin - 32 * w);
    }
  }
}

/// Bits [begin, end) of N words.
template <int N>
GNAFORGE_HD void set_range(int begin, int end, unsigned (&words)[N]) {
  unsigned above[N];
  set_bits_from(begin, words);
  set_bits_from(end, above);
  GNAFORGE_UNROLL
  for (int w = 0; w < N; ++w) words[w] &= ~above[w];
}

/// Adds `bits` to `words`, moved up by `first`; what is then beyond them is dropped.
template <int M, int N>
GNAFORGE_HD void place_bits(const unsigned (&bits)[M], int first, unsigned (&words)[N]) {
  GNAFORGE_UNROLL
  for (int w = 0; w < N; ++w) {
    const int from = 32 * w - first;
    if (from <= -32 || from >= 32 * M) continue;
    if (from < 0)
      words[w] |= bits[0] << -from;
    else
      words[w] |= bits_at(bits[from / 32], from / 32 + 1 < M ? bits[from / 32 + 1] : 0, from % 32);
  }
}

/// `bits`, of which there are Period < 32, again and again.
template <int Period, int N>
GNAFORGE_HD void repeat_bits(unsigned bits, unsigned (&words)[N]) {
  unsigned copies = 0;  // a product with it puts them side by side
  GNAFORGE_UNROLL
  for (int first = 0; first < 32; first += Period) copies |= 1u << first;
  words[0] = bits * copies;
  GNAFORGE_UNROLL
  for (int w = 1; w < N; ++w) {
    const int from = 32 * w % Period;
    if (from == 0)
      words[w] = words[0];
    else if (w == 1)
      words[w] = (bits >> from) + bits * (copies << (Period - from));
    else
      words[w] = bits_at(words[0], words[1], from);
  }
}

/// What one query sees of one KV tile.
template <class KvTile>
struct RowMask {
  static constexpr int rank = KvTile::rank, words = ceil_div(KvTile::volume, 32);

  /// Visible columns, 32 in a word, one bit each: the row-major tile column c is visible iff along each axis its
  /// coordinate is in `range`, which need not lie within the tile. Bits past the tile are 0.
  GNAFORGE_HD static void find(const Interval (&range)[rank], unsigned (&bits)[words]) { find_from<0>(range, bits); }

 private:
  /// The same of a slice of the tile that has the axes D and on. It consists of equal slices, as far as they are
  /// visible. Where these are many, it's a range of the slice, and one of them again and again.
  template <int D, int N>
  GNAFORGE_HD static void find_from(const Interval (&range)[rank], unsigned (&bits)[N]) {
    constexpr int extent = KvTile::extent(D), pitch = KvTile::pitch(D);
    const int begin = range[D].begin, end = range[D].end;
    if constexpr (D + 1 == rank) {
      set_range(begin, end, bits);
      if constexpr (extent % 32 != 0) bits[N - 1] &= ~0u >> (32 - extent % 32);
    } else {
      unsigned inner[ceil_div(pitch, 32)];
      find_from<D + 1>(range, inner);
      if constexpr (pitch >= 32 || extent <= 2) {
        GNAFORGE_UNROLL
        for (int w = 0; w < N; ++w) bits[w] = 0;
        GNAFORGE_UNROLL
        for (int at = 0; at < extent; ++at)
          if (begin <= at && at < end) place_bits(inner, at * pitch, bits);
      } else {
        unsigned repeated[N];
        repeat_bits<pitch>(inner[0], repeated);
        set_range(clip(begin, extent) * pitch, clip(end, extent) * pitch, bits);
        GNAFORGE_UNROLL
        for (int w = 0; w < N; ++w) bits[w] &= repeated[w];
      }
    }
  }

  GNAFORGE_HD static int clip(int position, int extent) { return max_int(min_int(position, extent), 0); }
};

}  // namespace gnaforge
