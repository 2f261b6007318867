// One Q tile of one head: where it lies and which KV tiles it visits. Device only.
#pragma once

#include "gnaforge/gna/source.h"
#include "gnaforge/gpu/params.h"
#include "gnaforge/ptx/shared.h"

namespace gnaforge::gpu {

template <class QTile>
struct Place {
  static constexpr int rank = QTile::rank;

  int slice, batch, head, kv_head;  ///< Batch entry within the slice.
  int q_begin[rank];                ///< A row of the slice.

  /// Query heads that share keys come next to each other, then neighbouring tiles: thread blocks that run at the same
  /// time share K and V in the L2 cache. Causal axes run backwards: their last tiles see most keys and take longest.
  template <class Params>
  __device__ __forceinline__ Place(const Params& params, int index) {
    slice = params.slice_of(index);
    index -= params.first_tile[slice];
    const auto& call = params.call(slice);
    const int member = call.heads_per_kv_head.split(index);
#pragma unroll
    for (int d = rank - 1; d >= 0; --d) {
      const Divisor tiles = params.q_tiles(slice, d, QTile::divisor(d));
      const int tile = tiles.split(index);
      q_begin[d] = (call.backwards >> d & 1 ? tiles.value - 1 - tile : tile) * QTile::extent(d);
    }
    kv_head = call.kv_heads.split(index);
    batch = index;
    head = kv_head * call.heads_per_kv_head.value + member;
  }
};

/// And which KV tiles it visits.
template <class Source>
struct Work : Place<typename Source::QTile> {
  static constexpr int rank = Source::rank;
  typename Source::List list;

  __device__ __forceinline__ Work(const Params<rank>& params, int index)
      : Place<typename Source::QTile>(params, index) {
    typename Source::Pattern pattern[rank];
#pragma unroll
    for (int d = 0; d < rank; ++d) pattern[d] = params.template pattern<typename Source::Pattern>(this->slice, d);
    list = Source::list(pattern, this->q_begin);
  }
};

/// A word per axis, zeros for those that there aren't, and one more.
template <int Rank>
__device__ __forceinline__ void store_coordinates(ptx::SharedAddress to, const int (&at)[Rank], int word) {
  ptx::store_shared(to, at[0], Rank > 1 ? at[min_int(1, Rank - 1)] : 0, Rank > 2 ? at[Rank - 1] : 0, word);
}

/// What consumers need to know of a Q tile. The producer works it out and leaves it in shared memory: in the
/// consumers' registers there is no room for how.
template <int Rank>
struct QTileFacts {
  int q_begin[Rank];
  int slice, head, batch;
  int count;     ///< KV tiles.
  int interior;  ///< The first of them, that need no mask.

  /// Whether some need one.
  __device__ __forceinline__ bool masked() const { return interior < count; }

  template <class QTile>
  static __device__ __forceinline__ void store(ptx::SharedAddress slot, const Place<QTile>& place, int count,
                                               int interior) {
    store_coordinates<Rank>(slot, place.q_begin, place.head);
    ptx::store_shared(slot + 16, place.batch, interior, count, place.slice);
  }

  /// The slice alone.
  static __device__ __forceinline__ int load_slice(ptx::SharedAddress slot) {
    unsigned word[1];
    ptx::load_shared_words(word, slot + 28);
    return static_cast<int>(word[0]);
  }

  static __device__ __forceinline__ QTileFacts load(ptx::SharedAddress slot) {
    const int4 a = ptx::load_shared(slot), b = ptx::load_shared(slot + 16);
    const int q[3] = {a.x, a.y, a.z};
    QTileFacts facts;
#pragma unroll
    for (int d = 0; d < Rank; ++d) facts.q_begin[d] = q[d];
    facts.head = a.w;
    facts.batch = b.x;
    facts.interior = b.y;
    facts.count = b.z;
    facts.slice = b.w;
    return facts;
  }
};

/// What consumers need to know of a KV tile, beside its stage.
template <int Rank>
struct KvTileFacts {
  int origin[Rank];  ///< The first key; where the kind has its mask otherwise, a number for it.
  TileKind kind;

  static __device__ __forceinline__ void store(ptx::SharedAddress slot, const int (&origin)[Rank], TileKind kind) {
    store_coordinates<Rank>(slot, origin, static_cast<int>(kind));
  }

  /// The same by the lanes of a warp, of which lane d has the first key along axis d, and those from the last axis on
  /// that along it.
  static __device__ __forceinline__ void store(ptx::SharedAddress slot, int lane, int origin, TileKind kind) {
    if (lane < 4) ptx::store_shared_word(slot + 4 * lane, lane < 3 ? origin : static_cast<unsigned>(kind));
  }

  static __device__ __forceinline__ KvTileFacts load(ptx::SharedAddress slot) {
    const int4 a = ptx::load_shared(slot);
    const int origin[3] = {a.x, a.y, a.z};
    KvTileFacts facts;
#pragma unroll
    for (int d = 0; d < Rank; ++d) facts.origin[d] = origin[d];
    facts.kind = static_cast<TileKind>(a.w);
    return facts;
  }
};

/// Dimensions of the tensor maps of a rank.
GNAFORGE_HD constexpr int map_rank(int rank) { return rank == 1 ? 4 : 5; }

/// Coordinates of a tensor copy: channel first, then head, tokens (innermost first) and batch entry. Rank 3 has one
/// dimension too few for that: either heads are folded into the channels, or the maps are of one batch entry.
template <int Rank>
__device__ __forceinline__ void map_coordinates(int (&at)[map_rank(Rank)], bool folded, int head_dim, int channel,
                                                int head, const int (&token)[Rank], int batch) {
  if constexpr (Rank == 3) {
    const int z = token[0], y = token[1], x = token[2];
    at[0] = folded ? head * head_dim + channel : channel;
    at[1] = folded ? x : head;
    at[2] = folded ? y : x;
    at[3] = folded ? z : y;
    at[4] = folded ? batch : z;
  } else {
    at[0] = channel;
    at[1] = head;
    for (int d = 0; d < Rank; ++d) at[2 + d] = token[Rank - 1 - d];
    at[Rank + 2] = batch;
  }
}

}  // namespace gnaforge::gpu
