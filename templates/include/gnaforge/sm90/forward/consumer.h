// The warpgroups that compute: each has 64 rows of the Q tile. Device only.
#pragma once

#include "gnaforge/ptx/barrier.h"
#include "gnaforge/ptx/marker.h"
#include "gnaforge/ptx/wgmma.h"
#include "gnaforge/sm90/forward/fragment_mask.h"
#include "gnaforge/sm90/forward/fragment_store.h"
#include "gnaforge/sm90/forward/producer.h"
#include "gnaforge/sm90/forward/softmax.h"
#include "gnaforge/sm90/turns.h"

namespace gnaforge::sm90 {

/// `Mma` has the products of this tile: scores(c, a, b, accumulate), 64 x columns x 16 with both factors in shared
/// memory, and values(c, a, b), 64 x value_head_dim x 16 with the left factor in registers.
template <class Config, class Mma>
struct Consumer {
  using L = Layout<Config>;
  using QTile = typename Config::QTile;
  using KvTile = typename Config::KvTile;
  static constexpr int rank = L::rank;
  using KvTileFacts = gpu::KvTileFacts<rank>;
  static constexpr int score_registers = L::columns / 2;
  static constexpr int out_registers = L::value_head_dim / 2;
  static constexpr int probability_registers = L::columns / 4;
  static_assert(L::Element::bytes == 2, "registers and 8x8 matrices hold 16-bit elements");
  static constexpr int turn_barrier = 1;  ///< First of one named barrier per warpgroup.
  static constexpr int out_barrier = turn_barrier + L::warpgroups;
  static constexpr int table_barrier = out_barrier + L::warpgroups;
  static constexpr bool counts_down = L::warpgroups == 3;  ///< The KV tiles that are left: a register less.

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

  /// Issues scores = Q K^T.
  __device__ __forceinline__ void multiply_qk(float (&scores)[score_registers], int stage) const {
    const std::uint64_t q = ptx::descriptor(shared + L::q_offset + warpgroup * warpgroup_rows * row_bytes, 16);
    const std::uint64_t k = ptx::descriptor(shared + L::k_offset + stage * L::k_bytes, 16);
    ptx::hold(scores);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < ceil_div(L::head_dim, L::mma_depth); ++step) {
      const int chunk = step * mma_bytes / row_bytes, within = step * mma_bytes % row_bytes;
      Mma::scores(scores, q + (chunk * L::q_chunk_bytes + within) / 16, k + (chunk * L::kv_chunk_bytes + within) / 16,
                  step > 0);
    }
    ptx::wgmma_commit();
    ptx::hold(scores);
  }

  /// Issues out += P V.
  __device__ __forceinline__ void multiply_pv(float (&out)[out_registers],
                                              std::uint32_t (&probabilities)[probability_registers], int stage) const {
    const std::uint64_t v = ptx::descriptor(shared + L::v_offset + stage * L::v_bytes, L::kv_chunk_bytes);
    ptx::hold(probabilities);
    ptx::hold(out);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < L::columns / L::mma_depth; ++step)
      Mma::values(out, probabilities + 4 * step, v + step * L::mma_depth * row_bytes / 16);
    ptx::wgmma_commit();
    ptx::hold(out);
    ptx::hold(probabilities);
  }

  __device__ __forceinline__ void round(std::uint32_t (&probabilities)[probability_registers],
                                        const float (&scores)[score_registers]) const {
#pragma unroll
    for (int i = 0; i < probability_registers; ++i)
      probabilities[i] = L::Element::pack(scores[2 * i], scores[2 * i + 1]);
  }

  __device__ __forceinline__ void store_log_sum_exp(const gpu::QTileFacts<rank>& work, const Softmax& softmax) const {
    float* const log_sum_exp = params.slices[work.slice].log_sum_exp;
    if (log_sum_exp == nullptr || lane() % 4 != 0) return;
    const auto& call = params.call(work.slice);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row() + lane() / 4 + 8 * r;
      bool exists = row < QTile::volume;
      std::int64_t offset = work.batch * call.lse_batch_stride + work.head * call.lse_head_stride;
#pragma unroll
      for (int d = 0; d < rank; ++d) {
        const int position = work.q_begin[d] + row / QTile::pitch(d) % QTile::extent(d);
        exists = exists && position < params.queries(work.slice, d);
        offset += position * call.lse_token_stride[d];
      }
      // Relative to infinity, a score of infinity has no probability, and the sum is a NaN.
      const float of_sum = softmax.shift[r] == INFINITY ? 0.0f : logf(softmax.sum[r]);
      if (exists) log_sum_exp[offset] = softmax.shift[r] * 0.693147181f + of_sum;
    }
  }

  __device__ __forceinline__ void sync_out() const {
    if constexpr (L::out_by_warpgroup)
      ptx::barrier_sync(out_barrier + warpgroup, warpgroup_threads);
    else
      ptx::barrier_sync(out_barrier, L::warpgroups * warpgroup_threads);
  }

  __device__ __forceinline__ bool stores_out() const {
    return thread() == 0 && (L::out_by_warpgroup || warpgroup == 0);
  }

  /// Normalises the output, rounds it, and stores it by way of shared memory; the copy clips at the tensor's borders.
  __device__ __forceinline__ void store_out(const gpu::QTileFacts<rank>& work, const Softmax& softmax,
                                            float (&out)[out_registers]) const {
    const float inverse[2] = {1 / softmax.sum[0], 1 / softmax.sum[1]};
    if constexpr (L::out_apart) {
      if (stores_out()) ptx::bulk_wait_read();
    }
    // Nobody reads any more what the output overwrites: the store of the last one or, where it takes the place of Q, a
    // product's part that is another warp's, which PTX doesn't say that this warp has waited for.
    sync_out();
    const ptx::SharedAddress region = shared + L::out_offset;
    store_fragment<typename L::Element>(region, L::q_chunk_bytes, first_row(), out, inverse);
    ptx::fence_shared_to_async();
    sync_out();
    if (stores_out()) {
      int token[rank];
#pragma unroll
      for (int d = 0; d < rank; ++d) token[d] = work.q_begin[d];
      if constexpr (L::out_by_warpgroup) token[0] += warpgroup * L::out_extent;
      const int skipped = L::out_by_warpgroup ? warpgroup * warpgroup_rows * row_bytes : 0;
#pragma unroll
      for (int c = 0; c < L::v_chunks; ++c) {
        int at[gpu::map_rank(rank)];
        gpu::map_coordinates<rank>(at, params.folded, L::value_head_dim, c * L::chunk_channels, work.head, token,
                                   work.batch);
        ptx::tensor_store(&params.maps(work.slice).out, region + skipped + c * L::q_chunk_bytes, at);
      }
      ptx::bulk_commit();
      if constexpr (!L::out_apart) {
        ptx::bulk_wait_read();
        ptx::mbarrier_arrive(shared + L::q_empty);
      }
    }
  }

  /// One Q tile, whose facts are in `slot`; `at` is where its first KV tile is in the ring, and then where the next
  /// one's will be.
  __device__ __forceinline__ void tile(ptx::SharedAddress slot, RingPosition& at) const {
    float scores[score_registers], out[out_registers];
    std::uint32_t probabilities[probability_registers];
    Softmax softmax;
    RowWindows<QTile, TileSource<Config>> windows;
    windows.kept_quad = ptx::reload_thread_index() & 3;  // which parts of extra keys ask for, too
    int count;
    {
      const gpu::QTileFacts<rank> work = gpu::QTileFacts<rank>::load(slot);
      count = work.count;
      if (work.masked()) windows.compute(params, work, first_row());
    }
    const auto load_facts = [&] { return KvTileFacts::load(shared + L::kv_facts + gpu::kv_facts_bytes * at.stage); };
    // Of the tile whose scores are ready: frees K, masks.
    const auto release_and_mask = [&](const KvTileFacts& facts) {
      release(L::k_empty + 8 * at.stage);
      if (facts.kind == TileKind::interior) return;
      ptx::mark<ptx::Marker::tile_is_shell>();
      windows.seen(params, shared + L::mask_table, facts, slot).apply(scores);
    };
    // Few tiles do this, so it may wait for the product under way.
    const auto rescale = [&](const float (&factor)[2]) {
      ptx::wgmma_wait<0>();
      ptx::hold(out);
#pragma unroll
      for (int i = 0; i < out_registers; ++i) out[i] *= factor[i / 2 % 2];
      ptx::hold(out);
    };

    ptx::mark<ptx::Marker::tile_begins>();
    softmax.begin();
    wait(L::k_full, at);
    KvTileFacts facts = load_facts();
    multiply_qk(scores, at.stage);
    ptx::wgmma_wait<0>();
    ptx::hold(scores);
    release_and_mask(facts);
    softmax.step(scores, params.scale_log2, [](const float (&)[2]) {});
#pragma unroll
    for (int i = 0; i < out_registers; ++i) out[i] = 0;

    int last_stage = -1;  // whose V the product under way reads
#pragma unroll 1
    for (int j = counts_down ? count : 1; counts_down ? j > 1 : j < count; j += counts_down ? -1 : 1) {
      ptx::mark<ptx::Marker::tile_begins>();  // of this tile, and the product with V of the one before
      // The loop is rotated: were this wait at the end of the body, ptxas would move it above the softmax, and the
      // product with V would overlap with nothing.
      ptx::wgmma_wait<0>();
      ptx::hold(out);
      ptx::hold(probabilities);
      if (last_stage >= 0) release(L::v_empty + 8 * last_stage);
      round(probabilities, scores);
      const RingPosition current = at;
      last_stage = at.stage;
      at.template advance<L::stages>();
      wait(L::k_full, at);
      turns().await();
      multiply_qk(scores, at.stage);
      wait(L::v_full, current);
      multiply_pv(out, probabilities, current.stage);
      turns().pass();
      facts = load_facts();  // while the product runs
      ptx::wgmma_wait<1>();
      ptx::hold(scores);
      release_and_mask(facts);
      softmax.step(scores, params.scale_log2, rescale);
    }
    ptx::wgmma_wait<0>();
    ptx::hold(out);
    ptx::hold(probabilities);
    if (last_stage >= 0) release(L::v_empty + 8 * last_stage);
    if constexpr (L::out_apart) release(L::q_empty);
    round(probabilities, scores);
    wait(L::v_full, at);
    multiply_pv(out, probabilities, at.stage);
    ptx::mark<ptx::Marker::tile_ends>();
    softmax.finish();
    const gpu::QTileFacts<rank> work = gpu::QTileFacts<rank>::load(slot);
    store_log_sum_exp(work, softmax);
    ptx::wgmma_wait<0>();
    ptx::hold(out);
    release(L::v_empty + 8 * at.stage);
    at.template advance<L::stages>();
    store_out(work, softmax, out);
  }

  __device__ __forceinline__ void run() const {
    RingPosition at{0, 0};
    if constexpr (rank > 1) {  // while the first tiles load
      make_mask_table<KvTile, L::warpgroups>(shared + L::mask_table);
      ptx::barrier_sync(table_barrier, L::warpgroups * warpgroup_threads);
    }
    turns().begin();
    for (unsigned i = 0; blockIdx.x + i * gridDim.x < static_cast<unsigned>(params.tiles()); ++i) {
      ptx::mbarrier_wait(shared + L::q_full, i % 2);
      tile(shared + L::q_facts + gpu::q_facts_bytes * (i % 2), at);
    }
    if (stores_out()) ptx::bulk_wait();
  }
};

}  // namespace gnaforge::sm90
