// Masks of shell tiles in the layout of wgmma's accumulator; see quad_columns.h. Device only.
#pragma once

#include "gnaforge/gna/mask.h"
#include "gnaforge/gpu/work.h"
#include "gnaforge/ptx/registers.h"
#include "gnaforge/sm90/forward/layout.h"
#include "gnaforge/sm90/forward/softmax.h"

namespace gnaforge::sm90 {

/// Writes the table of masks to shared memory. All consumers do, who then meet at a barrier.
template <class KvTile, int Warpgroups>
__device__ __forceinline__ void make_mask_table(ptx::SharedAddress table) {
  using Columns = QuadColumns<KvTile>;
  constexpr int threads = Warpgroups * warpgroup_threads;
  const int thread = static_cast<int>(threadIdx.x) - warpgroup_threads;
#pragma unroll
  for (int d = 0; d < KvTile::rank; ++d)  // short axes by different warps
    for (int i = thread ^ (32 * d); i < Columns::coordinates(d) * 4 * Columns::words; i += threads)
      ptx::store_shared_word(table + Columns::table_offset(d) + 4 * i,
                             Columns::below(d, i / (4 * Columns::words), i / Columns::words % 4, i % Columns::words));
}

/// Of a thread's columns those that its two rows see.
template <int Words>
struct SeenColumns {
  unsigned word[2][Words];

  /// Sets scores of the others to -infinity.
  template <int N>
  __device__ __forceinline__ void apply(float (&scores)[N]) const {
    static_assert(ceil_div(N, 64) == Words, "one accumulator per tile");
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int i = 0; i < N / 4; ++i)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (!(word[r][i / 16] >> (2 * i + c) % 32 & 1)) scores[element(i, r, c)] = -INFINITY;
  }
};

/// What a thread's two rows see, found once per Q tile, of which the warpgroups' rows are the box `QTile`. `Source` is
/// the kernel's tile source; its parameters are gpu::LaunchParams, or have what those have.
template <class QTile, class Source>
struct RowWindows {
  using KvTile = typename Source::KvTile;
  using Columns = QuadColumns<KvTile>;
  static constexpr int rank = Source::rank;
  static constexpr int words = Columns::words;

  Interval row[2][rank];
  int kept_quad;
  /// Three warpgroups with this many scores have no register for it.
  static constexpr bool keeps_quad = QTile::volume <= 128 || KvTile::volume < 128;

  /// The thread's place in its quad.
  __device__ __forceinline__ int quad() const {
    return keeps_quad ? kept_quad : static_cast<int>(ptx::reload_thread_index() & 3);
  }

  /// Whether rows r and r + 8 of any 16 lie at the same coordinate along `d`, and so see the same.
  static __device__ __forceinline__ constexpr bool rows_agree(int d) {
    return QTile::pitch(d) % 16 == 0 || 8 % (QTile::pitch(d) * QTile::extent(d)) == 0;
  }

  /// `first_row` is the warp's, within the Q tile. Rows of tokens that don't exist get the last one's windows; nobody
  /// stores them. Lane i works it out for row i % 16.
  template <class Params>
  __device__ __forceinline__ void compute(const Params& params, const gpu::QTileFacts<rank>& work, int first_row) {
    const int lane = ptx::reload_thread_index() & 31;
    const int own = first_row + lane % 16;
    kept_quad = lane & 3;
#pragma unroll
    for (int d = 0; d < rank; ++d) {
      const auto pattern = params.template pattern<typename Source::Pattern>(work.slice, d);
      const int query = work.q_begin[d] + own / QTile::pitch(d) % QTile::extent(d);
      Interval keys = Source::row(pattern, min_int(query, params.queries(work.slice, d) - 1));
      if constexpr (Source::has_sides) {  // rows instead of positions; see lane_tiles.h
        const int first = params.group(work.slice, d).kv_begin;
        keys = {keys.begin - first, keys.end - first};
      }
#pragma unroll
      for (int r = 0; r < 2; ++r)
        row[r][d] = {__shfl_sync(~0u, keys.begin, lane / 4 + 8 * r), __shfl_sync(~0u, keys.end, lane / 4 + 8 * r)};
    }
  }

  /// Of a KV tile that needs a mask. `table` is that of masks; where there are several calls, the Q tile's facts are in
  /// `slot`.
  template <class Params>
  __device__ __forceinline__ SeenColumns<words> seen(const Params& params, ptx::SharedAddress table,
                                                     const gpu::KvTileFacts<rank>& facts,
                                                     ptx::SharedAddress slot = 0) const {
    Ends ends = ends_of(
        [&](int d, Interval keys) { return Interval{keys.begin - facts.origin[d], keys.end - facts.origin[d]}; });
    if constexpr (Source::has_sides) {
      // Few tiles are below a split, or have extra keys in part. Others take a branch for it, which waits for nothing:
      // its question is asked before the above is worked out.
      ends.hold();
      if constexpr (Params::takes_extra_keys) {
        if (facts.kind != TileKind::shell) {
          if (facts.kind == TileKind::part)
            ends = ends_of_part(facts.origin[0]);
          else
            ends = ends_of_sides(params, Params::several_calls ? gpu::QTileFacts<rank>::load_slice(slot) : 0, facts);
        }
      } else if (facts.kind == TileKind::shell_below) {
        ends = ends_of_sides(params, 0, facts);
      }
    }
    unsigned along[rank][2][words];  // one axis alone
#pragma unroll
    for (int d = 0; d < rank; ++d) {
      find(along[d][0], ends, 0, table, d);
      if (!rows_agree(d))
        find(along[d][1], ends, 1, table, d);
      else
#pragma unroll
        for (int w = 0; w < words; ++w) along[d][1][w] = along[d][0][w];
    }
    SeenColumns<words> columns;
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int w = 0; w < words; ++w) {
        columns.word[r][w] = along[0][r][w];
#pragma unroll
        for (int d = 1; d < rank; ++d) columns.word[r][w] &= along[d][r][w];
      }
    return columns;
  }

 private:
  /// Where what the rows see of a tile begins and ends: coordinates that have an entry in the table, or numbers of
  /// columns where there is none.
  struct Ends {
    int begin[2][rank], end[2][rank];

    __device__ __forceinline__ void hold() {
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int d = 0; d < rank; ++d)
          if (r == 0 || !rows_agree(d)) RowWindows::hold(begin[r][d], end[r][d]);
    }
  };

  /// To the compiler, they come from elsewhere from here on.
  template <class... Int>
  static __device__ __forceinline__ void hold(Int&... values) {
    (hold_one(values), ...);
  }
  static __device__ __forceinline__ void hold_one(int& value) { asm volatile("" : "+r"(value)); }

  /// `seen(d, keys)`: those of a tile among the keys of a row along `d`, counted from its first.
  template <class Seen>
  __device__ __forceinline__ Ends ends_of(const Seen& seen) const {
    Ends ends;
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int d = 0; d < rank; ++d) {
        if (r == 1 && rows_agree(d)) continue;
        const Interval keys = seen(d, row[r][d]);
        ends.begin[r][d] = rank == 1 ? Columns::count_below(keys.begin, quad()) : Columns::clip(d, keys.begin);
        ends.end[r][d] = rank == 1 ? Columns::count_below(keys.end, quad()) : Columns::clip(d, keys.end);
      }
    return ends;
  }

  /// The same of a tile below the split of some axis. Nothing of this is worked out, or kept in registers, for others.
  /// Sides are the same in all slices of a call.
  template <class Params>
  __device__ __forceinline__ Ends ends_of_sides(const Params& params, int slice,
                                                const gpu::KvTileFacts<rank>& facts) const {
    return ends_of([&](int d, Interval keys) {
      int axis = d;
      hold(keys.begin, keys.end, axis);
      return Source::seen(params.template pattern<typename Source::Pattern>(slice, axis), keys, facts.origin[d]);
    });
  }

  /// The same of a tile of extra keys of which some columns count, the same ones for all rows: `those` is how many they
  /// are or, where there is a table, where in it the producer has left them as an entry of the first axis.
  __device__ __forceinline__ Ends ends_of_part(int those) const {
    Ends ends;
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int d = 0; d < rank; ++d) {
        if (r == 1 && rows_agree(d)) continue;
        ends.begin[r][d] = 0;
        ends.end[r][d] =
            rank > 1 ? d == 0 ? those : KvTile::extent(d) : Columns::count_below(those, ptx::reload_thread_index() & 3);
      }
    return ends;
  }

  /// Columns whose coordinate along `d` row r sees.
  __device__ __forceinline__ void find(unsigned (&columns)[words], const Ends& ends, int r, ptx::SharedAddress table,
                                       int d) const {
    if constexpr (rank == 1) {
#pragma unroll
      for (int w = 0; w < words; ++w) columns[w] = range_bits(ends.begin[r][d] - 32 * w, ends.end[r][d] - 32 * w);
    } else {
      const ptx::SharedAddress entries = table + Columns::table_offset(d) + 4 * words * quad();
      unsigned below_begin[words], below_end[words];
      ptx::load_shared_words(below_begin, entries + ends.begin[r][d] * Columns::entry_bytes);
      ptx::load_shared_words(below_end, entries + ends.end[r][d] * Columns::entry_bytes);
#pragma unroll
      for (int w = 0; w < words; ++w) columns[w] = below_end[w] & ~below_begin[w];
    }
  }
};

}  // namespace gnaforge::sm90
