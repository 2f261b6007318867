// One Q tile of one head: where it lies and which KV tiles it visits. Device only.
#pragma once

#include "gnaforge/gna/source.h"
#include "gnaforge/gpu/params.h"
#include "gnaforge/ptx/shared.h"

namespace gnaforge::gpu {

template <class Source>
struct Work {
  using QTile = typename Source::QTile;
  static constexpr int rank = Source::rank;

  int slice, batch, head, kv_head;  ///< Batch entry within the slice.
  int q_begin[rank];
  typename Source::List list;

  __device__ __forceinline__ Work(const Params<rank>& params, int index) {
    place(params, index);
    Axis axis[rank];
#pragma unroll
    for (int d = 0; d < rank; ++d) axis[d] = params.axis_of(slice, d);
    list = Source::list(axis, q_begin);
  }

  /// The same for all lanes of a warp, who are here together. Each works out one axis and tells the others: one after
  /// the other, axes would take up to three times as long.
  __device__ __forceinline__ Work(const Params<rank>& params, int index, int lane) {
    place(params, index);
    const int own = rank == 1 ? 0 : min_int(lane, rank - 1);
    int own_begin = q_begin[rank - 1];
#pragma unroll
    for (int d = 0; d < rank - 1; ++d) own_begin = own == d ? q_begin[d] : own_begin;
    const auto along = Source::along(params.axis_of(slice, own), own_begin, own);
#pragma unroll
    for (int d = 0; d < rank; ++d) list.axis[d] = rank == 1 ? along : from_lane(along, d);
    list.finish();
  }

 private:
  static __device__ __forceinline__ Interval from_lane(Interval interval, int lane) {
    return {__shfl_sync(~0u, interval.begin, lane), __shfl_sync(~0u, interval.end, lane)};
  }
  static __device__ __forceinline__ AxisTiles from_lane(const AxisTiles& tiles, int lane) {
    return {from_lane(tiles.visited, lane), from_lane(tiles.interior, lane), __shfl_sync(~0u, tiles.count, lane)};
  }

  /// Query heads that share keys come next to each other, then neighbouring tiles: thread blocks that run at the same
  /// time share K and V in the L2 cache. Causal axes run backwards: their last tiles see most keys and take longest.
  __device__ __forceinline__ void place(const Params<rank>& params, int index) {
    slice = params.slice_of(index);
    index -= params.first_tile[slice];
    const int member = params.heads_per_kv_head.split(index);
#pragma unroll
    for (int d = rank - 1; d >= 0; --d) {
      const Divisor tiles = params.q_tiles(slice, d, QTile::divisor(d));
      const int tile = tiles.split(index);
      q_begin[d] = (params.axis[d].causal ? tiles.value - 1 - tile : tile) * QTile::extent(d);
    }
    kv_head = params.kv_heads.split(index);
    batch = index;
    head = kv_head * params.heads_per_kv_head.value + member;
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
  int count;   ///< KV tiles.
  int masked;  ///< Whether some of them need a mask.

  template <class Source>
  static __device__ __forceinline__ void store(ptx::SharedAddress slot, const Work<Source>& work) {
    store_coordinates<Rank>(slot, work.q_begin, work.head);
    ptx::store_shared(slot + 16, work.batch, work.list.interior < work.list.count, work.list.count, work.slice);
  }

  static __device__ __forceinline__ QTileFacts load(ptx::SharedAddress slot) {
    const int4 a = ptx::load_shared(slot), b = ptx::load_shared(slot + 16);
    const int q[3] = {a.x, a.y, a.z};
    QTileFacts facts;
#pragma unroll
    for (int d = 0; d < Rank; ++d) facts.q_begin[d] = q[d];
    facts.head = a.w;
    facts.batch = b.x;
    facts.masked = b.y;
    facts.count = b.z;
    facts.slice = b.w;
    return facts;
  }
};

/// What consumers need to know of a KV tile, beside its stage.
template <int Rank>
struct KvTileFacts {
  int origin[Rank];  ///< The first key.
  TileKind kind;

  static __device__ __forceinline__ void store(ptx::SharedAddress slot, const int (&origin)[Rank], TileKind kind) {
    store_coordinates<Rank>(slot, origin, static_cast<int>(kind));
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
