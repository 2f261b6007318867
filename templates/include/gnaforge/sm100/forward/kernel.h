// The sm100 forward kernel, of four warpgroups: in the first, warp 0 loads and warp 1 issues products; the next two do
// the softmax of a half of the rows each, or of all of them and the copies of Q to tensor memory; the last one stores.
// Device only.
//
// mbarriers, [half] of rows, [buffer] of scores (the half's own, or every other KV tile's), [stage] of K and V in turn.
// Arrivals of warps are one each, those of products come when all that were issued before are done.
//   name              arrivals a phase     by whom                                      who waits
//   q_full[half]      1 and the bytes      load, before the copies                      products; with q_copied, copies
//   q_empty[half]     1                    products, the last one with Q                load
//                     4                    where Q is copied, warps that have done so   load
//   kv_full[stage]    1 and the bytes      load, before the copies                      products
//   kv_empty[stage]   1                    products                                     load
//   scores_full[buf]  1                    products                                     softmax
//   p_first[buf]      4                    warps: the first part of P is in tensor      products
//                                          memory (layout.h), and the output is rescaled
//   p_last[buf]       4, if two parts      warps: and the last; of one word computed    products, of two parts
//                                          of a tile of several, before p_first
//   out_full[half]    1                    products, the Q tile's last                  stores
//   out_empty[half]   4                    warps that have the output in registers      products, a Q tile's first
//   out_done[half]    1, if P is apart     products, after each P V                     softmax, before it stores P,
//                     or one half                                                       and where it rescales
//   scores_read[half] 4, if P is apart     warps that have them in registers            products
//   q_copied          4, if Q is copied    warps that have done so                      products
//   q_used            1, if Q is copied    products, the last one with Q                copies
//   statistics_full   4, [2][half]         warps, at the end of a Q tile                stores
//   q_facts_full      1, [4]               load                                         all others
//   kv_facts_full     1, [8]               load                                         softmax, where there are masks
// The first wait of load for *_empty passes at once, as do those of products for out_empty, of copies for q_used, and
// of softmax for out_done.
//
// P is apart from scores, in columns of its own, where two halves leave room. A half's products are then by turns
// scores of the next KV tile, once those of this one are in registers, and P V of this one.
//
// What needs no barrier. Scores take the place of probabilities that a product has read, if P isn't apart: products of
// one thread are done in their order. A rescaled output is complete: with two halves whose P isn't apart, the product
// before it was issued before the scores that the softmax has waited for. A slot of facts is read before it is written
// again: four Q tiles later, the Q tile that was read, also between its KV tiles, is stored; and a KV tile's K finds
// its stage empty when the softmax of the one two before has begun. Likewise statistics, two Q tiles later: a Q tile's
// last P comes after the first P V of the tile before, which waits until the one before that is stored.
#pragma once

#include "gnaforge/sm100/forward/copy_q.h"
#include "gnaforge/sm100/forward/epilogue.h"
#include "gnaforge/sm100/forward/load.h"
#include "gnaforge/sm100/forward/mma.h"
#include "gnaforge/sm100/forward/softmax.h"

namespace gnaforge::sm100 {

template <class Config>
__device__ __forceinline__ void init_barriers(ptx::SharedAddress shared) {
  using L = Layout<Config>;
  const auto init = [&](int barriers, int count, int arrivals) {
    for (int i = 0; i < count; ++i) ptx::mbarrier_init(shared + barriers + 8 * i, arrivals);
  };
  constexpr int warps = warpgroup_threads / 32;
  init(L::q_full, 2, 1);
  init(L::q_empty, 2, L::q_from_tensor ? warps : 1);
  init(L::kv_full, L::stages, 1);
  init(L::kv_empty, L::stages, 1);
  init(L::scores_full, 2, 1);
  init(L::p_first, 2, warps);
  init(L::p_last, 2, warps);
  init(L::out_full, 2, 1);
  init(L::out_empty, 2, warps);
  init(L::out_done, L::p_apart ? 2 : 1, 1);
  init(L::scores_read, L::p_apart ? 2 : 0, warps);
  init(L::q_copied, 1, warps);
  init(L::q_used, 1, 1);
  init(L::statistics_full, 4, warps);
  init(L::q_facts_full, L::q_facts_slots, 1);
  init(L::kv_facts_full, L::kv_facts_slots, 1);
  ptx::fence_mbarrier_init();
}

/// Clears rows of Q, K and V that no box has: products read them. What comes of those of Q goes nowhere, but nothing
/// should depend on what was in memory; those of V are multiplied by 0.
template <class Config>
__device__ __forceinline__ void clear_padding(unsigned char* memory) {
  using L = Layout<Config>;
  if constexpr (L::half_queries < half_rows) {
    gpu::clear_rows<L::threads, half_rows>(memory + L::q_offset, L::halves * L::qk_chunks, L::half_queries);
    ptx::fence_shared_to_async();
  }
  if constexpr (L::columns < L::kv_rows) {
    constexpr int blocks = L::stages * L::stage_bytes / L::kv_chunk_bytes;
    gpu::clear_rows<L::threads, L::kv_rows>(memory + L::kv_offset, blocks, L::columns);
    ptx::fence_shared_to_async();
  }
}

template <class Config>
__device__ __forceinline__ void forward(const Params<Config>& params) {
  using L = Layout<Config>;
  extern __shared__ __align__(gpu::swizzle_bytes) unsigned char memory[];
  const ptx::SharedAddress shared = ptx::shared_address(memory);
  // The compiler knows that it is the same in all lanes, and so what follows from it: that has registers of its own.
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  const ptx::TensorAddress lanes = warp % 4 * 32 << 16;  // those of tensor memory that the warp reaches
  if (threadIdx.x == 0) {
    ptx::prefetch_map(&params.maps(0).q);
    ptx::prefetch_map(&params.maps(0).k);
    ptx::prefetch_map(&params.maps(0).v);
    init_barriers<Config>(shared);
    ptx::store_shared_word(shared + L::zero, 0);
  }
  if (warp == L::mma_warp) ptx::allocate_tensor_memory(shared + L::tensor_base, tensor_columns);
  clear_padding<Config>(memory);
  __syncthreads();
  // All columns begin at 0, which products then have as a constant.
  if (ptx::reload_shared_word(shared + L::tensor_base) != 0) __trap();
  if (warp < 4) {
    ptx::registers_down<L::other_registers>();
    if (warp == L::load_warp) Load<Config>{params, shared}.run();
    if (warp == L::mma_warp) {
      if (ptx::elect()) Mma<Config>{shared}.run();
      __syncwarp();
    }
  } else if (warp < 12) {
    ptx::registers_up<L::softmax_registers>();
    const int half = warp / 4 - 1;
    if (half < L::halves)
      Softmax<Config>{params, shared, lanes, half}.run();
    else if constexpr (L::q_from_tensor)
      CopyQ<Config>{shared, lanes}.run();
  } else {
    ptx::registers_down<L::other_registers>();
    Epilogue<Config>{params, shared, lanes}.run();
  }
  __syncthreads();  // each role has told of its last use of tensor memory behind a fence
  ptx::fence_tensor_after();
  if (warp == L::mma_warp) ptx::free_tensor_memory(0, tensor_columns);
}

}  // namespace gnaforge::sm100
