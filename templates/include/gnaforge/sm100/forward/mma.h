// The warp that issues products: one thread. Device only.
#pragma once

#include "gnaforge/gpu/ring.h"
#include "gnaforge/ptx/hold.h"
#include "gnaforge/ptx/tcgen05.h"
#include "gnaforge/sm100/forward/facts.h"

namespace gnaforge::sm100 {

template <class Config>
struct Mma {
  using L = Layout<Config>;
  static constexpr std::uint32_t scores_product = ptx::product_descriptor(L::Factors::code, L::columns, false);
  static constexpr std::uint32_t values_product = ptx::product_descriptor(L::Factors::code, L::out_channels, true);

  ptx::SharedAddress shared;

  __device__ __forceinline__ void wait(int barrier, std::uint32_t parity) const {
    ptx::mbarrier_wait(shared + barrier, parity);
  }
  __device__ __forceinline__ void wait_stage(gpu::RingPosition at) const { wait(L::kv_full + 8 * at.stage, at.parity); }
  /// Arrives there when the products so far are done.
  __device__ __forceinline__ void commit(int barrier) const { ptx::commit_products(shared + barrier); }
  __device__ __forceinline__ void release_stage(gpu::RingPosition at) const { commit(L::kv_empty + 8 * at.stage); }

  __device__ __forceinline__ std::uint32_t descriptor(int offset, int leading) const {
    return ptx::matrix_descriptor(ptx::anew(shared + offset), leading);
  }

  /// Issues scores = Q K^T, of the first keys of the tile.
  __device__ __forceinline__ void multiply_qk(int half, int buffer, int stage, int columns) const {
    const std::uint32_t product = ptx::with_columns(scores_product, columns);
    const std::uint32_t q = descriptor(L::q_offset + half * L::half_bytes, 16);
    const std::uint32_t k = descriptor(L::kv_offset + stage * L::stage_bytes, 16);
#pragma unroll
    for (int step = 0; step < ceil_div(L::head_dim, L::mma_depth); ++step) {
      const int chunk = step * mma_bytes / row_bytes, within = step * mma_bytes % row_bytes;
      const std::uint32_t right = k + (chunk * L::kv_chunk_bytes + within) / 16;
      if constexpr (L::q_from_tensor)
        ptx::multiply_tensor<L::Element::bytes>(L::scores(buffer), L::q_tensor + mma_bytes / 4 * step, right, product,
                                                step > 0);
      else
        ptx::multiply_shared<L::Element::bytes>(L::scores(buffer), q + (chunk * L::q_chunk_bytes + within) / 16, right,
                                                product, step > 0);
    }
    commit(L::scores_full + 8 * buffer);
  }

  /// Issues out (+)= P V, of the columns [First, Last) of P.
  template <int First, int Last>
  __device__ __forceinline__ void multiply_pv_of(int half, int buffer, int stage, bool accumulate) const {
    const std::uint32_t v = descriptor(L::kv_offset + stage * L::stage_bytes, L::kv_chunk_bytes);
#pragma unroll
    for (int step = First / L::mma_depth; step < ceil_div(Last, L::mma_depth); ++step)
      ptx::multiply_tensor<L::Element::bytes>(L::out(half), L::p(buffer) + mma_bytes / 4 * step,
                                              v + step * L::mma_depth * row_bytes / 16, values_product,
                                              accumulate || step > First);
  }

  /// The same of the first `columns`, which are N at most, each part when it is there.
  template <int N = L::columns>
  __device__ __forceinline__ void multiply_pv(int half, int buffer, int stage, std::uint32_t parity, bool accumulate,
                                              int columns) const {
    constexpr int fewer = L::Short::below(N);
    if constexpr (fewer > 0)
      if (columns <= fewer) {
        multiply_pv<fewer>(half, buffer, stage, parity, accumulate, columns);
        return;
      }
    constexpr int split = L::first_columns(N);
    wait(L::p_first + 8 * buffer, parity);
    ptx::fence_tensor_after();
    multiply_pv_of<0, split>(half, buffer, stage, accumulate);
    if constexpr (split < N) {
      wait(L::p_last + 8 * buffer, parity);
      ptx::fence_tensor_after();
      multiply_pv_of<split, N>(half, buffer, stage, true);
    }
    if constexpr (!L::pair || L::p_apart) commit(L::out_done + 8 * half);
  }

  /// A Q tile's KV tiles.
  struct KvTiles {
    int count;  ///< 0 if there is no further Q tile.
    ShortFacts shorter;

    __device__ __forceinline__ int columns(int j) const {
      return L::Short::any ? shorter.columns_of(j, L::columns) : L::columns;
    }
  };

  /// Of the next Q tile.
  __device__ __forceinline__ KvTiles next_tiles(QTiles<Config>& tiles) const {
    const ptx::SharedAddress at = tiles.next();
    KvTiles found{QTiles<Config>::Facts::load(at).count, {}};
    if constexpr (L::Short::any) found.shorter = ShortFacts::of(at);
    return found;
  }

  /// Two halves take turns: P V of one KV tile, then Q K^T of the next, or the other way round if P is apart. The next
  /// may be the first one of the next Q tile: between Q tiles nothing runs dry.
  __device__ __forceinline__ void run_pair() const {
    QTiles<Config> tiles{shared};
    gpu::RingPosition at{0, 0};
    std::uint32_t p_parity = 0, q_parity = 0, out_parity = 1;
    KvTiles of = next_tiles(tiles);
    int j = 0, columns = of.columns(0);  // of the current KV tile
    wait_stage(at);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      wait(L::q_full + 8 * half, q_parity);
      multiply_qk(half, half, at.stage, columns);
      if (of.count == 1) commit(L::q_empty + 8 * half);
    }
    release_stage(at);
    at.template advance<L::stages>();
#pragma unroll 1
    for (;;) {
      const gpu::RingPosition v = at;
      at.template advance<L::stages>();
      const bool first = j == 0, last = ++j == of.count;
      if (last) {
        of = next_tiles(tiles);
        j = 0;
        q_parity ^= 1;
      }
      const int next_columns = of.columns(j);
      wait_stage(v);
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const int half = step / 2;
        if (step % 2 == (L::p_apart ? 1 : 0)) {  // P V
          if (first) wait(L::out_empty + 8 * half, out_parity);
          multiply_pv(half, half, v.stage, p_parity, !first, columns);
          if (last) commit(L::out_full + 8 * half);
          if (half == 1) release_stage(v);
        } else if (of.count != 0) {
          if (last) wait(L::q_full + 8 * half, q_parity);
          if (half == 0) wait_stage(at);
          if constexpr (L::p_apart) {
            wait(L::scores_read + 8 * half, p_parity);
            ptx::fence_tensor_after();
          }
          multiply_qk(half, half, at.stage, next_columns);
          if (j + 1 == of.count) commit(L::q_empty + 8 * half);
          if (half == 1) release_stage(at);
        }
      }
      if (of.count == 0) return;
      at.template advance<L::stages>();
      p_parity ^= 1;
      if (first) out_parity ^= 1;
      columns = next_columns;
    }
  }

  /// One half: while its softmax computes one KV tile, the scores of the next.
  __device__ __forceinline__ void run_single() const {
    QTiles<Config> tiles{shared};
    gpu::RingPosition at{0, 0};
    std::uint32_t number = 0, q_parity = 0;  // number: of the KV tile, among the thread block's
    for (;;) {
      const KvTiles of = next_tiles(tiles);
      if (of.count == 0) return;
      wait_stage(at);
      wait(L::q_from_tensor ? L::q_copied : L::q_full, q_parity);
      if constexpr (L::q_from_tensor) ptx::fence_tensor_after();
      multiply_qk(0, number % 2, at.stage, of.columns(0));
      release_stage(at);
      at.template advance<L::stages>();
#pragma unroll 1
      for (int j = 1; j <= of.count; ++j) {
        const gpu::RingPosition v = at;
        at.template advance<L::stages>();
        if (j < of.count) {
          wait_stage(at);
          multiply_qk(0, (number + 1) % 2, at.stage, of.columns(j));
          release_stage(at);
          at.template advance<L::stages>();
        } else {
          commit(L::q_from_tensor ? L::q_used : L::q_empty);
        }
        if (j == 1) wait(L::out_empty, q_parity ^ 1);
        wait_stage(v);
        multiply_pv(0, number % 2, v.stage, number / 2 % 2, j > 1, of.columns(j - 1));
        release_stage(v);
        ++number;
      }
      commit(L::out_full);
      q_parity ^= 1;
    }
  }

  __device__ __forceinline__ void run() const {
    if constexpr (L::pair)
      run_pair();
    else
      run_single();
  }
};

}  // namespace gnaforge::sm100
