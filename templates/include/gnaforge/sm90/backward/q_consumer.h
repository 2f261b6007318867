// The warpgroups of backward_q that compute: each has 64 rows of the Q tile. Device only.
#pragma once

#include "gnaforge/ptx/marker.h"
#include "gnaforge/sm90/backward/products.h"
#include "gnaforge/sm90/backward/q_producer.h"
#include "gnaforge/sm90/backward/statistics.h"
#include "gnaforge/sm90/forward/fragment_mask.h"
#include "gnaforge/sm90/forward/fragment_store.h"
#include "gnaforge/sm90/turns.h"

namespace gnaforge::sm90::backward {

/// `Mma` has the products of this tile: scores(c, a, b, accumulate), 64 x columns x 16 with both factors in shared
/// memory, and values(c, a, b), 64 x head_dim x 16 with the left factor in registers.
template <class Config, class Mma>
struct QConsumer {
  using L = QLayout<Config>;
  using QTile = typename Config::QTile;
  using KvTile = typename Config::KvTile;
  static constexpr int rank = L::rank;
  using KvTileFacts = gpu::KvTileFacts<rank>;
  using QTileFacts = gpu::QTileFacts<rank>;
  static constexpr int score_registers = L::columns / 2;
  static constexpr int grad_registers = L::head_dim / 2;
  static_assert(L::Element::bytes == 2, "registers and 8x8 matrices hold 16-bit elements");
  static constexpr int store_barrier = 1;  ///< First of one named barrier per warpgroup.
  static constexpr int turn_barrier = store_barrier + L::warpgroups;
  static constexpr int table_barrier = turn_barrier + L::warpgroups;

  const Params<rank>& params;
  ptx::SharedAddress shared;
  int warpgroup;

  __device__ __forceinline__ int thread() const { return threadIdx.x % warpgroup_threads; }
  __device__ __forceinline__ int lane() const { return threadIdx.x % 32; }
  __device__ __forceinline__ int first_row() const {
    return warpgroup * warpgroup_rows + ptx::reload_thread_index() % warpgroup_threads / 32 * 16;
  }

  __device__ __forceinline__ void wait(int barriers, RingPosition at) const {
    ptx::mbarrier_wait(shared + barriers + 8 * at.stage, at.parity);
  }

  /// One arrival per warp.
  __device__ __forceinline__ void release(int barrier) const {
    if (lane() == 0) ptx::mbarrier_arrive(shared + barrier);
  }

  __device__ __forceinline__ Turns<L::warpgroups, turn_barrier> turns() const { return {warpgroup}; }

  __device__ __forceinline__ RowStatistics statistics(const QTileFacts& work, int r) const {
    const int row = first_row() + lane() / 4 + 8 * r;
    int position[rank];
#pragma unroll
    for (int d = 0; d < rank; ++d) position[d] = work.q_begin[d] + row / QTile::pitch(d) % QTile::extent(d);
    return load_statistics<rank>(params, work.slice, work.batch, work.head, position, row < QTile::volume);
  }

  __device__ __forceinline__ void sync_stores() const {
    if constexpr (L::stores_by_warpgroup)
      ptx::barrier_sync(store_barrier + warpgroup, warpgroup_threads);
    else
      ptx::barrier_sync(store_barrier, L::warpgroups * warpgroup_threads);
  }

  __device__ __forceinline__ bool stores() const { return thread() == 0 && (L::stores_by_warpgroup || warpgroup == 0); }

  /// Multiplies Q's gradient by the scale, and adds what its tensor holds, by way of shared memory.
  __device__ __forceinline__ void add_held(const QTileFacts& work, float (&grad)[grad_registers],
                                           const int (&token)[rank], ptx::SharedAddress region, int skipped,
                                           std::uint32_t parity) const {
    const ptx::SharedAddress full = shared + L::held_full + (L::stores_by_warpgroup ? 8 * warpgroup : 0);
    if (stores()) {
      ptx::mbarrier_arrive_expect(full, L::qk_chunks * L::grad_box_bytes);
      gpu::load_box<L, L::qk_chunks>(params.maps[work.slice].grad[0], params.folded, full, region + skipped,
                                     L::q_chunk_bytes, L::head_dim, work.head, token, work.batch);
    }
    ptx::mbarrier_wait(full, parity);
    add_fragment<typename L::Element, QTile::volume>(region, L::q_chunk_bytes, first_row(), grad, params.scale);
  }

  /// Scales Q's gradient, rounds it, and stores it by way of shared memory; the copy clips at the tensor's borders.
  /// `parity` is that of the tile.
  __device__ __forceinline__ void store_grad(const QTileFacts& work, float (&grad)[grad_registers],
                                             std::uint32_t parity) const {
    if constexpr (L::grad_apart) {
      if (stores()) ptx::bulk_wait_read();
    }
    // Nobody reads any more what the gradient overwrites: the store of the last one or, where it takes the place of Q,
    // a product's part that is another warp's, which PTX doesn't say that this warp has waited for.
    sync_stores();
    const ptx::SharedAddress region = shared + L::grad_offset;
    int token[rank];
#pragma unroll
    for (int d = 0; d < rank; ++d) token[d] = work.q_begin[d];
    if constexpr (L::stores_by_warpgroup) token[0] += warpgroup * L::grad_extent;
    const int skipped = L::stores_by_warpgroup ? warpgroup * warpgroup_rows * row_bytes : 0;
    float factor[2] = {params.scale, params.scale};
    if (params.accumulates) {
      add_held(work, grad, token, region, skipped, parity);
      factor[0] = factor[1] = 1;
    }
    store_fragment<typename L::Element>(region, L::q_chunk_bytes, first_row(), grad, factor);
    ptx::fence_shared_to_async();
    sync_stores();
    if (!stores()) return;
    gpu::store_box<L, L::qk_chunks>(params.maps[work.slice].grad[0], params.folded, region + skipped, L::q_chunk_bytes,
                                    L::head_dim, work.head, token, work.batch);
    ptx::bulk_commit();
    if constexpr (!L::grad_apart) {
      ptx::bulk_wait_read();
      ptx::mbarrier_arrive(shared + L::q_empty);
    }
  }

  /// One Q tile, whose facts are in `slot`; `at` is where its first KV tile is in the ring, and then where the next
  /// one's will be.
  __device__ __forceinline__ void tile(ptx::SharedAddress slot, RingPosition& at) const {
    float scores[score_registers], slopes[score_registers], grad[grad_registers];
    std::uint32_t rounded[score_registers / 2];
    RowWindows<QTile, TileSource<Config>> windows;
    windows.kept_quad = ptx::reload_thread_index() & 3;  // which parts of extra keys ask for, too
    RowStatistics row[2];
    int count;
    {
      const QTileFacts work = QTileFacts::load(slot);
      count = work.count;
      if (work.masked()) windows.compute(params, work, first_row());
#pragma unroll
      for (int r = 0; r < 2; ++r) row[r] = statistics(work, r);
    }
    const ptx::SharedAddress own_rows = warpgroup * warpgroup_rows * row_bytes;
    const auto k = [&] { return shared + L::k_offset + at.stage * L::k_bytes; };

    // Issues S and dP, which become scores and slopes.
    const auto issue = [&] {
      wait(L::k_full, at);
      multiply_shared<L, Mma, L::head_dim>(scores, shared + L::q_offset + own_rows, L::q_chunk_bytes, k(),
                                           L::kv_chunk_bytes);
      wait(L::v_full, at);
      multiply_shared<L, Mma, L::value_head_dim>(slopes, shared + L::grad_out_offset + own_rows, L::q_chunk_bytes,
                                                 shared + L::v_offset + at.stage * L::v_bytes, L::kv_chunk_bytes);
    };
    // Of scores that are there; slopes may be under way.
    const auto find_probabilities = [&] {
      const KvTileFacts facts = KvTileFacts::load(shared + L::kv_facts + gpu::kv_facts_bytes * at.stage);
      if (facts.kind != TileKind::interior) {
        ptx::mark<ptx::Marker::tile_is_shell>();
        windows.seen(params, shared + L::mask_table, facts).apply(scores);
      }
#pragma unroll
      for (int i = 0; i < score_registers; ++i)
        scores[i] = ptx::exp2_fast(fmaf(scores[i], params.scale_log2, -row[i / 2 % 2].shift));
    };
    // Issues dQ += dS K; with that a turn begins.
    const auto add_to_grad = [&] {
      // The loop is rotated: were this wait at the end of the body, ptxas would move it above the exponentials, which
      // would overlap with nothing.
      ptx::wgmma_wait<0>();
      ptx::hold(slopes);
      release(L::v_empty + 8 * at.stage);
#pragma unroll
      for (int i = 0; i < score_registers / 2; ++i)
        rounded[i] = L::Element::pack(scores[2 * i] * (slopes[2 * i] - row[i % 2].delta),
                                      scores[2 * i + 1] * (slopes[2 * i + 1] - row[i % 2].delta));
      turns().await();
      multiply_registers<L, L::columns>(grad, rounded, k(), L::kv_chunk_bytes,
                                        [](auto& c, const std::uint32_t* a, std::uint64_t b) { Mma::values(c, a, b); });
    };

    ptx::mark<ptx::Marker::tile_begins>();
    turns().await();
    issue();
    turns().pass();
#pragma unroll
    for (int i = 0; i < grad_registers; ++i) grad[i] = 0;
    ptx::wgmma_wait<1>();
    ptx::hold(scores);
    find_probabilities();
#pragma unroll 1
    for (int j = 1; j < count; ++j) {
      ptx::mark<ptx::Marker::tile_begins>();  // of this tile, and the product with K of the one before
      add_to_grad();
      const int last_stage = at.stage;
      at.template advance<L::stages>();
      issue();
      turns().pass();
      ptx::wgmma_wait<1>();
      ptx::hold(scores);
      ptx::hold(grad);
      ptx::hold(rounded);
      release(L::k_empty + 8 * last_stage);
      find_probabilities();
    }
    add_to_grad();
    turns().pass();
    if constexpr (L::grad_apart) release(L::q_empty);
    ptx::mark<ptx::Marker::tile_ends>();
    const QTileFacts work = QTileFacts::load(slot);
    ptx::wgmma_wait<0>();
    ptx::hold(grad);
    ptx::hold(rounded);
    release(L::k_empty + 8 * at.stage);
    at.template advance<L::stages>();
    store_grad(work, grad, (slot - shared - L::q_facts) / gpu::q_facts_bytes);
  }

  __device__ __forceinline__ void run() const {
    RingPosition at{0, 0};
    std::uint32_t q_parity = 0;
    turns().begin();
    if constexpr (rank > 1) {  // while the first tiles load
      make_mask_table<KvTile, L::warpgroups>(shared + L::mask_table);
      ptx::barrier_sync(table_barrier, L::warpgroups * warpgroup_threads);
    }
    ptx::wait_for_grids();  // statistics come by ordinary loads, which may find older values in a cache
    for (int index = blockIdx.x; index < params.tiles(); index += gridDim.x) {
      ptx::mbarrier_wait(shared + L::q_full, q_parity);
      tile(shared + L::q_facts + gpu::q_facts_bytes * q_parity, at);
      q_parity ^= 1;
    }
    if (stores()) ptx::bulk_wait();
  }
};

}  // namespace gnaforge::sm90::backward
