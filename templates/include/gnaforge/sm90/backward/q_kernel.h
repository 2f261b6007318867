// The sm90 kernel of Q's gradient. Warpgroup 0 loads: its first warp is the producer, of which one lane writes and
// copies. Warpgroups 1 to W compute: consumers 0 to W - 1. Device only.
//
// Of a KV tile, with P = 2^(S - shift): S = Q K^T and dP = dO V^T from shared memory, dS = P (dP - delta) in registers,
// dQ += dS K. See core/backward.h for where the shift and delta come from.
//
// mbarriers, those of K and V one per stage of the ring. The producer's waits for *_empty pass at once the first time.
//   name      arrivals a phase                      by whom                                            who waits
//   q_full    1 and the bytes of Q and dO           the producer, before the copies                    consumers
//   q_empty   4 W, if grad_apart                    warps, when their last product with dO is done     the producer
//             1, or W if stores_by_warpgroup        else threads that stored, when what was Q is read  the producer
//   k_full    1 and the bytes of K                  the producer, before the copies                    consumers
//   k_empty   4 W                                   warps, when their dS K is done                     the producer
//   v_full    1 and the bytes of V                  the producer, before the copies                    consumers
//   v_empty   4 W                                   warps, when their dO V^T is done                   the producer
//   part_full 1 and the bytes of K or V             the producer, before it copies extra keys of which the producer
//                                                 not all count
//   held_full 1 and what gradients take             threads that store, before they copy what these    consumers
//                                                   are added to
// The producer writes q_facts and kv_facts before it arrives at q_full and k_full; they are read after the wait.
//
// Named barriers, counted in threads:
//   number             threads                      who syncs                                        who only arrives
//   start_barrier      all                          all, once mbarriers are there and padding is clear
//   store_barrier + w  128, if stores_by_warpgroup  consumer w, before and after it writes its gradient
//   store_barrier      128 W, else                  all consumers, likewise
//   turn_barrier + w   256, if W > 1                consumer w, before dS K and the next scores      its predecessor,
//                                                                                                    after
//   table_barrier      128 W                        all consumers, but for rank 1, once the table of masks is there
#pragma once

#include "gnaforge/sm90/backward/q_consumer.h"

namespace gnaforge::sm90::backward {

template <class Config>
__device__ __forceinline__ void init_q_barriers(ptx::SharedAddress shared) {
  using L = QLayout<Config>;
  constexpr int warps = L::warpgroups * 4;
  ptx::mbarrier_init(shared + L::q_full, 1);
  ptx::mbarrier_init(shared + L::part_full, 1);
  for (int i = 0; i < L::warpgroups; ++i) ptx::mbarrier_init(shared + L::held_full + 8 * i, 1);
  ptx::mbarrier_init(shared + L::q_empty, L::grad_apart ? warps : L::stores_by_warpgroup ? L::warpgroups : 1);
  for (int stage = 0; stage < L::stages; ++stage) {
    ptx::mbarrier_init(shared + L::k_full + 8 * stage, 1);
    ptx::mbarrier_init(shared + L::v_full + 8 * stage, 1);
    ptx::mbarrier_init(shared + L::k_empty + 8 * stage, warps);
    ptx::mbarrier_init(shared + L::v_empty + 8 * stage, warps);
  }
  ptx::fence_mbarrier_init();
}

/// Clears what copies and products read but nobody writes: rows of Q and of the output's gradient beyond the tile, and
/// channels of Q's gradient beyond the last. What comes of them goes nowhere, but nothing should depend on what was in
/// memory.
template <class Config>
__device__ __forceinline__ void clear_q_padding(unsigned char* memory) {
  using L = QLayout<Config>;
  constexpr int volume = Config::QTile::volume;
  constexpr bool channels = L::grad_apart && L::head_dim % L::chunk_channels != 0;
  if constexpr (volume < L::rows)
    gpu::clear_rows<L::threads, L::rows>(memory + L::q_offset, L::qk_chunks + L::v_chunks, volume);
  if constexpr (channels)
    gpu::clear_rows<L::threads, L::rows>(memory + L::grad_offset + (L::qk_chunks - 1) * L::q_chunk_bytes, 1, 0);
  if constexpr (volume < L::rows || channels) ptx::fence_shared_to_async();
}

template <class Config, class Mma>
__device__ __forceinline__ void backward_q(const Params<Config::QTile::rank>& params) {
  using L = QLayout<Config>;
  extern __shared__ __align__(gpu::swizzle_bytes) unsigned char memory[];
  // Of lane 0, so that the compiler knows that all lanes have the same: such numbers have registers of their own.
  const ptx::SharedAddress shared = __shfl_sync(~0u, ptx::shared_address(memory), 0);
  const int warp = static_cast<int>(__shfl_sync(~0u, threadIdx.x / 32, 0));
  const auto start = [] { ptx::barrier_sync(start_barrier, L::threads); };
  clear_q_padding<Config>(memory);
  if (threadIdx.x < warpgroup_threads) {
    if constexpr (L::shares_registers) ptx::registers_down<L::producer_registers>();
    if (warp == 0)
      QProducer<Config>{params, shared}.run(start);
    else
      start();
  } else {
    if (threadIdx.x == warpgroup_threads) {  // the producer looks for its first Q tile meanwhile
      ptx::prefetch_map(&params.maps[0].q);
      ptx::prefetch_map(&params.maps[0].k);
      ptx::prefetch_map(&params.maps[0].v);
      ptx::prefetch_map(&params.maps[0].grad_out);
      init_q_barriers<Config>(shared);
    }
    start();
    if constexpr (L::shares_registers) ptx::registers_up<L::consumer_registers>();
    QConsumer<Config, Mma>{params, shared, warp * 32 / warpgroup_threads - 1}.run();
  }
}

}  // namespace gnaforge::sm90::backward
