// The warpgroups that compute dK and dV. S^T = K Q^T and dP^T = V dO^T have keys as rows, so P^T and dS^T are in
// registers as the left factors of dV += P^T dO and dK += dS^T Q: nothing is exchanged between warpgroups. Device only.
#pragma once

#include "gnaforge/gpu/copy.h"
#include "gnaforge/ptx/barrier.h"
#include "gnaforge/ptx/marker.h"
#include "gnaforge/sm90/backward/products.h"
#include "gnaforge/sm90/backward/transposed_mask.h"
#include "gnaforge/sm90/forward/fragment_store.h"
#include "gnaforge/sm90/turns.h"

namespace gnaforge::sm90::backward {

/// `Mma` has the products of the kernel: scores(c, a, b, accumulate), 64 x queries x 16 with both factors in shared
/// memory, and key_gradient(c, a, b) and value_gradient(c, a, b), 64 x channels x 16 with the left factor in registers.
template <class Config, class Mma>
struct KvConsumer {
  using L = KvLayout<Config>;
  using KvTile = typename L::KvTile;
  using Element = typename L::Element;
  using Mask = TransposedMask<Config>;
  static constexpr int rank = L::rank;
  static constexpr int score_registers = L::queries / 2;
  static constexpr int factor_registers = L::queries / 4;
  static constexpr int store_barrier = 1;  ///< First of one named barrier per warpgroup.
  static constexpr int turn_barrier = store_barrier + L::warpgroups;
  static constexpr int all_barrier = turn_barrier + L::warpgroups;

  const Params<rank>& params;
  ptx::SharedAddress shared;
  int warpgroup;

  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }
  static __device__ __forceinline__ int thread() { return threadIdx.x % warpgroup_threads; }
  /// Warpgroups with keys of their own take turns at issuing scores and dP.
  __device__ __forceinline__ Turns<L::wide ? 1 : L::warpgroups, turn_barrier> turns() const { return {warpgroup}; }
  /// Of the warpgroup's keys.
  __device__ __forceinline__ int group_row() const { return L::wide ? 0 : warpgroup * warpgroup_rows; }
  /// Of the warp's.
  __device__ __forceinline__ int first_row() const {
    return group_row() + ptx::reload_thread_index() % warpgroup_threads / 32 * 16;
  }

  __device__ __forceinline__ void wait(int barriers, RingPosition at) const {
    ptx::mbarrier_wait(shared + barriers + 8 * at.stage, at.parity);
  }
  /// One arrival per warp.
  __device__ __forceinline__ void release(RingPosition at) const {
    if (lane() == 0) ptx::mbarrier_arrive(shared + L::empty + 8 * at.stage);
  }

  __device__ __forceinline__ void issue_scores(float (&scores)[score_registers], RingPosition at) const {
    multiply_shared<L, Mma, L::head_dim>(scores, shared + L::k_offset + group_row() * row_bytes, L::kv_chunk_bytes,
                                         shared + L::q_offset + at.stage * L::q_bytes, L::q_chunk_bytes);
  }
  __device__ __forceinline__ void issue_slopes(float (&slopes)[score_registers], RingPosition at) const {
    multiply_shared<L, Mma, L::value_head_dim>(
        slopes, shared + L::v_offset + group_row() * row_bytes, L::kv_chunk_bytes,
        shared + L::grad_out_offset + at.stage * L::grad_out_bytes, L::q_chunk_bytes);
  }

  /// Issues dV += P^T dO.
  template <int N>
  __device__ __forceinline__ void add_values(float (&gradient)[N], std::uint32_t (&factors)[factor_registers],
                                             RingPosition at) const {
    multiply_registers<L, L::queries>(
        gradient, factors, shared + L::grad_out_offset + at.stage * L::grad_out_bytes, L::q_chunk_bytes,
        [](float (&c)[N], const std::uint32_t* a, std::uint64_t b) { Mma::value_gradient(c, a, b); });
  }
  /// Issues dK += dS^T Q.
  template <int N>
  __device__ __forceinline__ void add_keys(float (&gradient)[N], std::uint32_t (&factors)[factor_registers],
                                           RingPosition at) const {
    multiply_registers<L, L::queries>(
        gradient, factors, shared + L::q_offset + at.stage * L::q_bytes, L::q_chunk_bytes,
        [](float (&c)[N], const std::uint32_t* a, std::uint64_t b) { Mma::key_gradient(c, a, b); });
  }

  /// Of two neighbouring columns of group `group`, the log-sum-exps, or the deltas.
  template <bool Deltas>
  __device__ __forceinline__ float2 statistics(RingPosition at, int group) const {
    unsigned pair[2];
    ptx::load_shared_words(pair, shared + L::statistics + at.stage * L::statistics_bytes + 8 * (lane() % 4) +
                                     (Deltas ? 4 * L::queries : 0) + 32 * group);
    return {__uint_as_float(pair[0]), __uint_as_float(pair[1])};
  }

  /// P, rounded. What a key isn't seen by is taken away from exponentials and not from scores, each right behind its
  /// own: so most of the time that a mask takes is hidden behind them.
  __device__ __forceinline__ void probabilities(std::uint32_t (&rounded)[factor_registers],
                                                const float (&scores)[score_registers], RingPosition at) const {
    const ptx::SharedAddress facts = shared + L::stage_facts + L::stage_facts_bytes * at.stage;
    if (QueriesFacts<rank>::load_interior(facts)) {
      exponentials(rounded, scores, at, [](float x, int, int) { return x; });
    } else {
      ptx::mark<ptx::Marker::tile_is_shell>();
      const auto seen = Mask::seen(shared, facts, first_row());
      exponentials(rounded, scores, at,
                   [&](float x, int row, int column) { return seen.word[row][0] >> column & 1 ? x : 0.0f; });
    }
  }

  /// `keep(exponential, row, column)`, rounded, of the thread's rows and columns.
  template <class Keep>
  __device__ __forceinline__ void exponentials(std::uint32_t (&rounded)[factor_registers],
                                               const float (&scores)[score_registers], RingPosition at,
                                               const Keep& keep) const {
#pragma unroll
    for (int g = 0; g < L::queries / 8; ++g) {
      const float2 lse = statistics<false>(at, g);
      const auto exponential = [&](int r, int c) {
        const float shift = c == 0 ? lse.x : lse.y;
        return keep(ptx::exp2_fast(fmaf(scores[element(g, r, c)], params.scale_log2, -shift)), r, 2 * g + c);
      };
#pragma unroll
      for (int r = 0; r < 2; ++r) rounded[2 * g + r] = Element::pack(exponential(r, 0), exponential(r, 1));
    }
  }

  /// dS = P (dP - delta), of rounded P, in its place.
  __device__ __forceinline__ void slopes(std::uint32_t (&rounded)[factor_registers],
                                         const float (&slopes)[score_registers], RingPosition at) const {
#pragma unroll
    for (int g = 0; g < L::queries / 8; ++g) {
      const float2 delta = statistics<true>(at, g);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float2 p = Element::unpack(rounded[2 * g + r]);
        rounded[2 * g + r] =
            Element::pack(p.x * (slopes[element(g, r, 0)] - delta.x), p.y * (slopes[element(g, r, 1)] - delta.y));
      }
    }
  }

  /// A gradient of the warp's 16 keys, rounded, to where the keys were.
  template <int N>
  __device__ __forceinline__ void store_rows(int region, const float (&gradient)[N], float factor) const {
    store_fragment<Element>(shared + region, L::kv_chunk_bytes, first_row(), gradient, {factor, factor});
  }

  __device__ __forceinline__ void sync_group() const {
    ptx::barrier_sync(store_barrier + warpgroup, warpgroup_threads);
  }
  __device__ __forceinline__ void sync_all() const {
    ptx::barrier_sync(all_barrier, L::warpgroups * warpgroup_threads);
  }

  __device__ __forceinline__ bool stores() const { return thread() == 0 && (L::stores_by_warpgroup || warpgroup == 0); }

  /// Stores the boxes of both gradients, which are in shared memory by now; the copies clip at the tensors' borders.
  __device__ __forceinline__ void store_boxes() const {
    const KvPlaceFacts<rank> place = KvPlaceFacts<rank>::load(shared + L::tile_facts);
    int token[rank];
#pragma unroll
    for (int d = 0; d < rank; ++d) token[d] = place.k_begin[d];
    if constexpr (L::stores_by_warpgroup) token[0] += warpgroup * L::grad_extent;
    const int skipped = L::stores_by_warpgroup ? group_row() * row_bytes : 0;
    const Maps& maps = params.maps[place.slice];
    gpu::store_box<L, L::qk_chunks>(maps.grad[0], params.folded, shared + L::k_offset + skipped, L::kv_chunk_bytes,
                                    L::head_dim, place.kv_head, token, place.batch);
    gpu::store_box<L, L::v_chunks>(maps.grad[1], params.folded, shared + L::v_offset + skipped, L::kv_chunk_bytes,
                                   L::value_head_dim, place.kv_head, token, place.batch);
    ptx::bulk_commit();
    ptx::bulk_wait_read();
    ptx::mbarrier_arrive(shared + L::kv_empty);
  }

  /// The barrier of what gradients are added to.
  __device__ __forceinline__ ptx::SharedAddress held_full() const {
    return shared + L::held_full + (L::stores_by_warpgroup ? 8 * warpgroup : 0);
  }

  /// Loads what the tensors of gradients that accumulate hold to where keys were.
  __device__ __forceinline__ void load_held() const {
    const KvPlaceFacts<rank> place = KvPlaceFacts<rank>::load(shared + L::tile_facts);
    int token[rank];
#pragma unroll
    for (int d = 0; d < rank; ++d) token[d] = place.k_begin[d];
    if constexpr (L::stores_by_warpgroup) token[0] += warpgroup * L::grad_extent;
    const int skipped = L::stores_by_warpgroup ? group_row() * row_bytes : 0;
    const Maps& maps = params.maps[place.slice];
    const bool of_keys = params.accumulates & 1, of_values = params.accumulates & 2;
    ptx::mbarrier_arrive_expect(held_full(),
                                ((of_keys ? L::qk_chunks : 0) + (of_values ? L::v_chunks : 0)) * L::grad_box_bytes);
    if (of_keys)
      gpu::load_box<L, L::qk_chunks>(maps.grad[0], params.folded, held_full(), shared + L::k_offset + skipped,
                                     L::kv_chunk_bytes, L::head_dim, place.kv_head, token, place.batch);
    if (of_values)
      gpu::load_box<L, L::v_chunks>(maps.grad[1], params.folded, held_full(), shared + L::v_offset + skipped,
                                    L::kv_chunk_bytes, L::value_head_dim, place.kv_head, token, place.batch);
  }

  /// Multiplies a gradient by `factor`, and adds what its tensor holds; returns what is left to multiply with. Without
  /// anything to add to, nothing is done here: store_fragment multiplies, too.
  template <int N>
  __device__ __forceinline__ float add_held(int region, float (&gradient)[N], float factor, int bit) const {
    if (!(params.accumulates & bit)) return factor;
    add_fragment<Element, KvTile::volume>(shared + region, L::kv_chunk_bytes, first_row(), gradient, factor);
    return 1;
  }

  /// The sums of a part of the queries, of the warp's 16 extra keys, of which these channels begin at `channel`.
  template <int N>
  __device__ __forceinline__ void store_sums(int extra, int channel, const float (&gradient)[N], float factor) const {
    constexpr int channels = L::head_dim + L::value_head_dim;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row() + lane() / 4 + 8 * r;
      if (row >= KvTile::volume) continue;
      float* const to = params.extra_work.sums + (std::int64_t{extra - 1} * KvTile::volume + row) * channels + channel +
                        2 * (lane() % 4);
#pragma unroll
      for (int g = 0; g < N / 4; ++g)
        *reinterpret_cast<float2*>(to + 8 * g) =
            float2{gradient[element(g, r, 0)] * factor, gradient[element(g, r, 1)] * factor};
    }
  }

  /// After `sum(number)` of extra keys or `fill()`, which has written gradients over keys that no product reads any
  /// more. `parity` is that of the tile.
  template <class Sum, class Fill>
  __device__ __forceinline__ void store(std::uint32_t parity, const Sum& sum, const Fill& fill) const {
    const int extra = KvPlaceFacts<rank>::load_extra(shared + L::tile_facts);
    // A warp has waited for its own part of a product; others' parts read the same keys.
    if constexpr (L::wide)
      sync_all();
    else
      sync_group();
    if (extra) {
      sum(extra);
      if constexpr (!L::wide && !L::stores_by_warpgroup) sync_all();
      if (!stores()) return;
      ptx::mbarrier_arrive(held_full());
      ptx::mbarrier_arrive(shared + L::kv_empty);
      return;
    }
    if (params.accumulates) {
      if constexpr (!L::wide && !L::stores_by_warpgroup) sync_all();
      if (stores()) load_held();
      ptx::mbarrier_wait(held_full(), parity);
    }
    fill();
    ptx::fence_shared_to_async();
    if constexpr (L::stores_by_warpgroup)
      sync_group();
    else
      sync_all();
    if (stores()) store_boxes();
  }

  /// Both gradients of the warpgroup's keys over all Q tiles; `at` is where the first one is in the ring, and then
  /// where the next KV tile's will be.
  __device__ __forceinline__ void tile(int steps, std::uint32_t parity, RingPosition& at) const {
    float key_gradient[L::head_dim / 2], value_gradient[L::value_head_dim / 2];
#pragma unroll
    for (float& x : key_gradient) x = 0;
#pragma unroll
    for (float& x : value_gradient) x = 0;
#pragma unroll 1
    for (int j = 0; j < steps; ++j) {
      ptx::mark<ptx::Marker::tile_begins>();
      float scores[score_registers], of_values[score_registers];
      std::uint32_t rounded[factor_registers], factors[factor_registers];
      wait(L::q_full, at);
      turns().await();
      issue_scores(scores, at);
      wait(L::grad_out_full, at);
      issue_slopes(of_values, at);
      turns().pass();
      ptx::wgmma_wait<1>();
      ptx::hold(scores);
      probabilities(rounded, scores, at);
      // dV goes to the tensor cores before dP is waited for: it takes all exponentials, so ptxas can't move that wait
      // above them. dS comes from rounded P, which frees the registers of S: of a copy, for P itself is a factor of the
      // product under way.
#pragma unroll
      for (int i = 0; i < factor_registers; ++i) asm volatile("mov.b32 %0, %1;" : "=r"(factors[i]) : "r"(rounded[i]));
      add_values(value_gradient, rounded, at);
      ptx::wgmma_wait<1>();
      ptx::hold(of_values);
      slopes(factors, of_values, at);
      add_keys(key_gradient, factors, at);
      ptx::wgmma_wait<0>();
      ptx::hold(value_gradient);
      ptx::hold(key_gradient);
      ptx::hold(rounded);
      ptx::hold(factors);
      release(at);
      at.template advance<L::stages>();
    }
    ptx::mark<ptx::Marker::tile_ends>();
    store(
        parity,
        [&](int extra) {
          store_sums(extra, 0, key_gradient, params.scale);
          store_sums(extra, L::head_dim, value_gradient, 1.0f);
        },
        [&] {
          store_rows(L::k_offset, key_gradient, add_held(L::k_offset, key_gradient, params.scale, 1));
          add_held(L::v_offset, value_gradient, 1.0f, 2);
          store_rows(L::v_offset, value_gradient, 1.0f);
        });
  }

  /// dV alone.
  __device__ __forceinline__ void value_tile(int steps, std::uint32_t parity, RingPosition& at) const {
    float gradient[L::value_head_dim / 2];
#pragma unroll
    for (float& x : gradient) x = 0;
#pragma unroll 1
    for (int j = 0; j < steps; ++j) {
      ptx::mark<ptx::Marker::tile_begins>();
      float scores[score_registers];
      std::uint32_t rounded[factor_registers];
      wait(L::q_full, at);
      issue_scores(scores, at);
      wait(L::grad_out_full, at);
      ptx::wgmma_wait<0>();
      ptx::hold(scores);
      probabilities(rounded, scores, at);
      add_values(gradient, rounded, at);
      ptx::wgmma_wait<0>();
      ptx::hold(gradient);
      ptx::hold(rounded);
      release(at);
      at.template advance<L::stages>();
    }
    ptx::mark<ptx::Marker::tile_ends>();
    store(
        parity, [&](int extra) { store_sums(extra, L::head_dim, gradient, 1.0f); },
        [&] {
          add_held(L::v_offset, gradient, 1.0f, 2);
          store_rows(L::v_offset, gradient, 1.0f);
        });
  }

  /// dK alone. The loop is rotated, as backward_q's: the wait for dP begins its body, or ptxas would move it above the
  /// exponentials. S of a tile follows the product of the one before: so tensor cores have work while that ends, and
  /// its stage is free before they are done.
  __device__ __forceinline__ void key_tile(int steps, std::uint32_t parity, RingPosition& at) const {
    float gradient[L::head_dim / 2], scores[score_registers], of_values[score_registers];
    std::uint32_t factors[factor_registers];
#pragma unroll
    for (float& x : gradient) x = 0;
    const auto find_scores = [&] {
      wait(L::q_full, at);
      issue_scores(scores, at);
    };
    const auto find_probabilities = [&] {
      wait(L::grad_out_full, at);
      issue_slopes(of_values, at);
      ptx::wgmma_wait<1>();
      ptx::hold(scores);
      probabilities(factors, scores, at);
    };
    const auto add_to_gradient = [&] {
      ptx::wgmma_wait<0>();
      ptx::hold(of_values);
      slopes(factors, of_values, at);
      add_keys(gradient, factors, at);
    };
    const auto end = [&](RingPosition stage) {
      ptx::hold(gradient);
      ptx::hold(factors);
      release(stage);
    };
    if (steps > 0) {
      ptx::mark<ptx::Marker::tile_begins>();
      find_scores();
      find_probabilities();
#pragma unroll 1
      for (int j = 1; j < steps; ++j) {
        ptx::mark<ptx::Marker::tile_begins>();  // of this tile, and the gradient of the one before
        add_to_gradient();
        const RingPosition last = at;
        at.template advance<L::stages>();
        find_scores();
        ptx::wgmma_wait<1>();
        end(last);
        find_probabilities();
      }
      add_to_gradient();
      ptx::wgmma_wait<0>();
      end(at);
      at.template advance<L::stages>();
    }
    ptx::mark<ptx::Marker::tile_ends>();
    store(
        parity, [&](int extra) { store_sums(extra, 0, gradient, params.scale); },
        [&] { store_rows(L::k_offset, gradient, add_held(L::k_offset, gradient, params.scale, 1)); });
  }

  /// All KV tiles; `compute(steps, parity, ring)` one of them.
  template <class Compute>
  __device__ __forceinline__ void each_tile(const Compute& compute) const {
    RingPosition at{0, 0};
    std::uint32_t parity = 0;
    for (int index = blockIdx.x; index < params.tiles(); index += gridDim.x) {
      ptx::mbarrier_wait(shared + L::kv_full, parity);
      compute(KvPlaceFacts<rank>::load_steps(shared + L::tile_facts), parity, at);
      parity ^= 1;
    }
    if (stores()) ptx::bulk_wait();
  }

  __device__ __forceinline__ void run() const {
    turns().begin();
    if constexpr (rank > 1) {  // while the first tiles load
      make_mask_table<typename L::QTile, L::warpgroups>(shared + L::mask_table);
      sync_all();
    }
    if constexpr (!L::wide)
      each_tile([&](int steps, std::uint32_t parity, RingPosition& at) { tile(steps, parity, at); });
    else if (warpgroup == 0)
      each_tile([&](int steps, std::uint32_t parity, RingPosition& at) { value_tile(steps, parity, at); });
    else
      each_tile([&](int steps, std::uint32_t parity, RingPosition& at) { key_tile(steps, parity, at); });
  }
};

}  // namespace gnaforge::sm90::backward
