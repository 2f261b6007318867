// The warps that load for a kernel of dK and dV: one brings Q and dO, one statistics of their rows, one K and V. Each
// goes through all tiles by itself, so that none waits for what another one is kept waiting by. Device only.
#pragma once

#include "gnaforge/gpu/copy.h"
#include "gnaforge/ptx/barrier.h"
#include "gnaforge/ptx/mbarrier.h"
#include "gnaforge/sm90/backward/kv_layout.h"
#include "gnaforge/sm90/backward/statistics.h"
#include "gnaforge/sm90/backward/transposed_tiles.h"
#include "gnaforge/sm90/extra_loads.h"
#include "gnaforge/sm90/forward/producer.h"

namespace gnaforge::sm90::backward {

/// What consumers need to know of a KV tile.
template <int Rank>
struct KvPlaceFacts {
  int k_begin[Rank];
  int steps;  ///< Q tiles of all query heads.
  int slice, batch, kv_head;
  int extra;  ///< As in KvPlace.

  __device__ __forceinline__ void store(ptx::SharedAddress slot) const {
    gpu::store_coordinates<Rank>(slot, k_begin, steps);
    ptx::store_shared(slot + 16, slice, batch, kv_head, extra);
  }

  static __device__ __forceinline__ KvPlaceFacts load(ptx::SharedAddress slot) {
    const int4 a = ptx::load_shared(slot), b = ptx::load_shared(slot + 16);
    const int k[3] = {a.x, a.y, a.z};
    KvPlaceFacts facts;
#pragma unroll
    for (int d = 0; d < Rank; ++d) facts.k_begin[d] = k[d];
    facts.steps = a.w;
    facts.slice = b.x;
    facts.batch = b.y;
    facts.kv_head = b.z;
    facts.extra = b.w;
    return facts;
  }

  /// The number of steps alone.
  static __device__ __forceinline__ int load_steps(ptx::SharedAddress slot) { return ptx::load_shared(slot).w; }

  /// And `extra`.
  static __device__ __forceinline__ int load_extra(ptx::SharedAddress slot) { return ptx::load_shared(slot + 16).w; }
};

/// What they need to know of a Q tile, beside its stage.
template <int Rank>
struct QueriesFacts {
  int origin[Rank];  ///< The first query.
  bool interior;
  int seen[Rank];  ///< Where in the table of what keys are seen by its run's part begins.

  /// By the lanes of a warp, of which lane d knows of axis d.
  static __device__ __forceinline__ void store(ptx::SharedAddress slot, int lane, int origin, int seen, bool interior) {
    if (lane > 3) return;
    ptx::store_shared_word(slot + 4 * lane, lane < 3 ? origin : static_cast<unsigned>(interior));
    ptx::store_shared_word(slot + 16 + 4 * lane, seen);
  }

  static __device__ __forceinline__ bool load_interior(ptx::SharedAddress slot) {
    return ptx::load_shared(slot).w != 0;
  }

  static __device__ __forceinline__ QueriesFacts load(ptx::SharedAddress slot) {
    const int4 a = ptx::load_shared(slot), b = ptx::load_shared(slot + 16);
    const int first[3] = {a.x, a.y, a.z}, parts[3] = {b.x, b.y, b.z};
    QueriesFacts facts;
#pragma unroll
    for (int d = 0; d < Rank; ++d) {
      facts.origin[d] = first[d];
      facts.seen[d] = parts[d];
    }
    facts.interior = a.w != 0;
    return facts;
  }
};

/// All lanes of a warp go through it together.
template <class Config>
struct KvProducer {
  using L = KvLayout<Config>;
  using QTile = typename L::QTile;
  using KvTile = typename L::KvTile;
  using Place = KvPlace<KvTile>;
  using Tiles = LaneQueries<QTile, KvTile>;
  static constexpr int rank = L::rank;

  const Params<rank>& params;
  ptx::SharedAddress shared;

  static __device__ __forceinline__ int lane() { return ptx::reload_thread_index() % 32; }

  /// The Q tiles of a KV tile: so many, from tile `index` of the group's query head `member` on.
  struct Steps {
    int member, index, count;
  };

  __device__ __forceinline__ Steps steps_of(const Place& place, const Tiles& tiles) const {
    const int all = tiles.count * params.heads_per_kv_head.value;
    if (!place.extra) return {0, 0, all};
    const int first = place.part * params.extra_work.steps;
    const std::int64_t batch = std::int64_t{params.first_batch(place.slice)} + place.batch;
    if (first >= all || place.k_begin[0] >= extra_length(params.extra_keys, place.piece, batch)) return {0, 0, 0};
    const int member = first / tiles.count;
    return {member, first - member * tiles.count, min_int(params.extra_work.steps, all - first)};
  }

  /// Calls f(place, tiles, head, index, ring) of each Q tile of each query head of each KV tile.
  template <class F>
  __device__ __forceinline__ void each_q_tile(const F& f) const {
    // A wait for the phase before the first returns at once: every stage is empty.
    RingPosition at{0, 1};
    for (int tile = blockIdx.x; tile < params.tiles(); tile += gridDim.x) {
      const Place place(params, tile);
      Tiles tiles(params, place);
      Steps steps = steps_of(place, tiles);
      if (place.extra) tiles.go_to(params, place.slice, steps.index);
      int head = place.kv_head * params.heads_per_kv_head.value + steps.member;
#pragma unroll 1
      for (; steps.count > 0; --steps.count) {
        f(place, tiles, head, steps.index, at);
        at.template advance<L::stages>();
        if (++steps.index < tiles.count) {
          tiles.step(steps.index);
        } else {
          steps.index = 0;
          ++head;
          tiles.restart();
        }
      }
    }
  }

  /// Q and dO.
  __device__ __forceinline__ void load_queries() const {
    // The launch may have begun before the one before it ended.
    ptx::wait_for_grids();
    const bool leads = ptx::elect();
    each_q_tile([&](const Place& place, const Tiles& tiles, int head, int index, RingPosition at) {
      const int origin = tiles.origin();
      int token[rank];
#pragma unroll
      for (int d = 0; d < rank; ++d) token[d] = Tiles::from_axis(origin, d);
      ptx::mbarrier_wait(shared + L::empty + 8 * at.stage, at.parity);
      QueriesFacts<rank>::store(shared + L::stage_facts + L::stage_facts_bytes * at.stage, lane(), origin,
                                tiles.run() * L::run_bytes, index < tiles.interior);
      // What they wrote is there before the leader arrives. And a lane two phases behind would take this phase of a
      // barrier for an earlier one.
      __syncwarp();
      if (!leads) return;
      const ptx::SharedAddress q_full = shared + L::q_full + 8 * at.stage;
      ptx::mbarrier_arrive_expect(q_full, L::q_bytes);
      gpu::load_box<L, L::qk_chunks>(params.maps[place.slice].q, params.folded, q_full,
                                     shared + L::q_offset + at.stage * L::q_bytes, L::q_chunk_bytes, L::head_dim, head,
                                     token, place.batch);
      const ptx::SharedAddress grad_out_full = shared + L::grad_out_full + 8 * at.stage;
      ptx::mbarrier_arrive_expect(grad_out_full, L::grad_out_bytes);
      gpu::load_box<L, L::v_chunks>(params.maps[place.slice].grad_out, params.folded, grad_out_full,
                                    shared + L::grad_out_offset + at.stage * L::grad_out_bytes, L::q_chunk_bytes,
                                    L::value_head_dim, head, token, place.batch);
    });
  }

  /// Statistics of boxes of any shape, in the caller's layout.
  __device__ __forceinline__ void load_row_statistics() const {
    ptx::wait_for_grids();
    constexpr int rows = ceil_div(L::queries, 32);
    each_q_tile([&](const Place& place, const Tiles& tiles, int head, int, RingPosition at) {
      const int own = tiles.origin();
      int origin[rank];
#pragma unroll
      for (int d = 0; d < rank; ++d) origin[d] = Tiles::from_axis(own, d);
      RowStatistics found[rows];
#pragma unroll
      for (int i = 0; i < rows; ++i) {
        const int row = lane() + 32 * i;
        int position[rank];
#pragma unroll
        for (int d = 0; d < rank; ++d) position[d] = origin[d] + row / QTile::pitch(d) % QTile::extent(d);
        found[i] = load_statistics<rank>(params, place.slice, place.batch, head, position, row < L::queries);
      }
      ptx::mbarrier_wait(shared + L::empty + 8 * at.stage, at.parity);
      const ptx::SharedAddress to = shared + L::statistics + at.stage * L::statistics_bytes;
#pragma unroll
      for (int i = 0; i < rows; ++i) {
        const int row = lane() + 32 * i;
        if (L::queries % 32 != 0 && row >= L::queries) continue;
        ptx::store_shared_word(to + 4 * row, __float_as_uint(found[i].shift));
        ptx::store_shared_word(to + 4 * (L::queries + row), __float_as_uint(found[i].delta));
      }
      __syncwarp();
      if (lane() == 0) ptx::mbarrier_arrive(shared + L::grad_out_full + 8 * at.stage);
    });
  }

  /// K and V, and what keys are seen by.
  __device__ __forceinline__ void load_keys() const {
    ptx::wait_for_grids();
    const bool leads = ptx::elect();
    std::uint32_t parity = 1;
    for (int tile = blockIdx.x; tile < params.tiles(); tile += gridDim.x) {
      const Place place(params, tile);
      KvPlaceFacts<rank> facts;
      facts.steps = steps_of(place, Tiles(params, place)).count;
      facts.slice = place.slice;
      facts.batch = place.batch;
      facts.kv_head = place.kv_head;
      facts.extra = place.extra;
#pragma unroll
      for (int d = 0; d < rank; ++d) facts.k_begin[d] = place.k_begin[d];
      ptx::mbarrier_wait(shared + L::kv_empty, parity);
      parity ^= 1;
      if (!place.extra) store_seen(place);
      if (leads) facts.store(shared + L::tile_facts);
      __syncwarp();
      if (!leads) continue;
      const ptx::SharedAddress full = shared + L::kv_full;
      ptx::mbarrier_arrive_expect(full, (L::qk_chunks + L::v_chunks) * KvTile::volume * row_bytes);
      if (place.extra) {
        load_extra_keys(place, full);
        continue;
      }
      gpu::load_box<L, L::qk_chunks>(params.maps[place.slice].k, params.folded, full, shared + L::k_offset,
                                     L::kv_chunk_bytes, L::head_dim, place.kv_head, place.k_begin, place.batch);
      gpu::load_box<L, L::v_chunks>(params.maps[place.slice].v, params.folded, full, shared + L::v_offset,
                                    L::kv_chunk_bytes, L::value_head_dim, place.kv_head, place.k_begin, place.batch);
    }
  }

 private:
  __device__ __forceinline__ void load_extra_keys(const Place& place, ptx::SharedAddress full) const {
    const ExtraMaps& maps = params.extra_maps(place.slice);
    const int repeated = params.extra_keys.repeated >> 2 * place.piece;
    const int batch = params.first_batch(place.slice) + place.batch;
    load_extra_box<L, L::qk_chunks>(maps.k[place.piece], repeated & 1, full, shared + L::k_offset, L::kv_chunk_bytes,
                                    place.kv_head, place.k_begin[0], batch);
    load_extra_box<L, L::v_chunks>(maps.v[place.piece], repeated & 2, full, shared + L::v_offset, L::kv_chunk_bytes,
                                   place.kv_head, place.k_begin[0], batch);
  }

  /// Writes by which queries the tile's keys are seen, once per run of Q tiles, none where a key doesn't exist.
  __device__ __forceinline__ void store_seen(const Place& place) const {
    const int first_run = params.has_sides ? 0 : 1, end_run = params.has_sides ? most_images : 2;
#pragma unroll 1
    for (int run = first_run; run < end_run; ++run)
#pragma unroll 1
      for (int i = lane(); i < L::coordinates; i += 32) {
        int d = 0, key = place.k_begin[0] + i;
#pragma unroll
        for (int e = 1; e < rank; ++e)
          if (i >= L::first_coordinate(e)) {
            d = e;
            key = place.k_begin[e] + i - L::first_coordinate(e);
          }
        Interval queries{0, 0};
        if (key < params.keys[place.slice][d])
          queries = queries_of_key(params.template pattern<Band>(place.slice, d),
                                   key + first_key(params, place.slice, d), run);
        const ptx::SharedAddress to = shared + L::seen_table + run * L::run_bytes + 8 * i;
        ptx::store_shared_word(to, queries.begin);
        ptx::store_shared_word(to + 4, queries.end);
      }
  }
};

}  // namespace gnaforge::sm90::backward
