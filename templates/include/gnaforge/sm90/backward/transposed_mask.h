// Masks of Q tiles that some key of a KV tile isn't seen by all of, where keys are rows and queries columns of wgmma's
// accumulator. By which queries a key is seen stands in a table in shared memory: registers hold two gradients, and
// have no room for it. Device only.
#pragma once

#include "gnaforge/sm90/backward/kv_producer.h"
#include "gnaforge/sm90/forward/fragment_mask.h"

namespace gnaforge::sm90::backward {

template <class Config>
struct TransposedMask {
  using L = KvLayout<Config>;
  using KvTile = typename L::KvTile;
  using Columns = typename L::Columns;
  static constexpr int rank = L::rank;

  /// Whether rows r and r + 8 of any 16 lie at the same coordinate along `d`, and so are seen by the same.
  static __device__ __forceinline__ constexpr bool rows_agree(int d) {
    return KvTile::pitch(d) % 16 == 0 || 8 % (KvTile::pitch(d) * KvTile::extent(d)) == 0;
  }

  /// The thread's columns that see its two rows, of the 16 from `first_row` on.
  static __device__ __forceinline__ SeenColumns<1> seen(ptx::SharedAddress shared, ptx::SharedAddress facts_slot,
                                                        int first_row) {
    const QueriesFacts<rank> facts = QueriesFacts<rank>::load(facts_slot);
    const int lane = ptx::reload_thread_index() % 32, quad = lane % 4;
    SeenColumns<1> columns;
#pragma unroll
    for (int d = 0; d < rank; ++d) {
      unsigned along = 0;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (r == 0 || !rows_agree(d)) {
          const int coordinate = (first_row + lane / 4 + 8 * r) / KvTile::pitch(d) % KvTile::extent(d);
          unsigned ends[2];
          ptx::load_shared_words(ends,
                                 shared + L::seen_table + facts.seen[d] + 8 * (L::first_coordinate(d) + coordinate));
          along = columns_between(shared + L::mask_table, d, quad, static_cast<int>(ends[0]) - facts.origin[d],
                                  static_cast<int>(ends[1]) - facts.origin[d]);
        }
        columns.word[r][0] = d == 0 ? along : columns.word[r][0] & along;
      }
    }
    return columns;
  }

 private:
  /// The thread's columns whose coordinate along `d` is from `begin` on and below `end`.
  static __device__ __forceinline__ unsigned columns_between(ptx::SharedAddress table, int d, int quad, int begin,
                                                             int end) {
    if constexpr (rank == 1) {
      return range_bits(Columns::count_below(begin, quad), Columns::count_below(end, quad));
    } else {
      const ptx::SharedAddress entries = table + Columns::table_offset(d) + 4 * quad;
      unsigned below_begin[1], below_end[1];
      ptx::load_shared_words(below_begin, entries + Columns::clip(d, begin) * Columns::entry_bytes);
      ptx::load_shared_words(below_end, entries + Columns::clip(d, end) * Columns::entry_bytes);
      return below_end[0] & ~below_begin[0];
    }
  }
};

}  // namespace gnaforge::sm90::backward
