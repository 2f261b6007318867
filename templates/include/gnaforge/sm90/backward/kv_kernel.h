// The sm90 kernel of dK and dV. Warpgroup 0 loads: warp 0 brings Q and dO, warp 1 statistics, warp 2 K and V.
// Warpgroups 1 to W compute: consumers 0 to W - 1. Device only.
//
// mbarriers, the last three one per stage of the ring. The loading warps' waits for *empty pass at once the first time.
//   name           arrivals a phase          by whom                                                  who waits
//   kv_full        1 and the bytes of both   warp 2, before the copies                                consumers
//   kv_empty       1, or W if stores_by_warpgroup   threads that stored, when what were K and V is read      warp 2
//   q_full         1 and the bytes of Q      warp 0, before the copies                                consumers
//   grad_out_full  2 and the bytes of dO     warp 0, before the copies; warp 1, after it wrote        consumers
//   empty          4 W                       warps, when their last product with the stage is done    warps 0 and 1
//   held_full      1 and what gradients take  threads that store, before they copy what these are added   consumers
//                                             to; or with extra keys at once
// Warp 2 writes what a KV tile's keys are seen by and tile_facts before it arrives at kv_full; warp 0 writes
// stage_facts before it arrives at q_full; warp 1 statistics. They are read after the wait.
//
// Named barriers, counted in threads:
//   number             threads          who syncs
//   start_barrier      all              all, once mbarriers are there
//   store_barrier + w  128, not wide    consumer w, before it writes gradients; and after, if stores_by_warpgroup
//   turn_barrier + w   256, if W > 1    consumer w, before its scores; its predecessor arrives after its own; not wide
//   all_barrier        128 W            all consumers: if wide, before they write gradients; after that unless
//                                       stores_by_warpgroup; but for rank 1, once the table of masks is there
#pragma once

#include "gnaforge/sm90/backward/kv_consumer.h"
#include "gnaforge/sm90/backward/kv_producer.h"

namespace gnaforge::sm90::backward {

template <class Config>
__device__ __forceinline__ void init_kv_barriers(ptx::SharedAddress shared) {
  using L = KvLayout<Config>;
  ptx::mbarrier_init(shared + L::kv_full, 1);
  for (int i = 0; i < L::warpgroups; ++i) ptx::mbarrier_init(shared + L::held_full + 8 * i, 1);
  ptx::mbarrier_init(shared + L::kv_empty, L::stores_by_warpgroup ? L::warpgroups : 1);
  for (int stage = 0; stage < L::stages; ++stage) {
    ptx::mbarrier_init(shared + L::q_full + 8 * stage, 1);
    ptx::mbarrier_init(shared + L::grad_out_full + 8 * stage, 2);
    ptx::mbarrier_init(shared + L::empty + 8 * stage, 4 * L::warpgroups);
  }
  ptx::fence_mbarrier_init();
}

/// Clears rows of K and V beyond the tile, which products read and no copy writes. What comes of them goes nowhere, but
/// nothing should depend on what was in memory.
template <class Config>
__device__ __forceinline__ void clear_kv_padding(unsigned char* memory) {
  using L = KvLayout<Config>;
  if constexpr (Config::KvTile::volume < L::key_rows) {
    gpu::clear_rows<L::threads, L::key_rows>(memory + L::k_offset, L::qk_chunks + L::v_chunks, Config::KvTile::volume);
    ptx::fence_shared_to_async();
  }
}

template <class Config, class Mma>
__device__ __forceinline__ void backward_keys(const Params<Config::QTile::rank>& params) {
  using L = KvLayout<Config>;
  extern __shared__ __align__(gpu::swizzle_bytes) unsigned char memory[];
  // Of lane 0, so that the compiler knows that they are the same in all lanes: such numbers have their own registers.
  const ptx::SharedAddress shared = __shfl_sync(~0u, ptx::shared_address(memory), 0);
  const int warp = static_cast<int>(__shfl_sync(~0u, threadIdx.x / 32, 0));
  clear_kv_padding<Config>(memory);
  if (threadIdx.x < warpgroup_threads) {
    if constexpr (L::shares_registers) ptx::registers_down<L::producer_registers>();
    ptx::barrier_sync(start_barrier, L::threads);
    const KvProducer<Config> producer{params, shared};
    if (warp == 0)
      producer.load_queries();
    else if (warp == 1)
      producer.load_row_statistics();
    else if (warp == 2)
      producer.load_keys();
  } else {
    if (threadIdx.x == warpgroup_threads) {
      const Maps& maps = params.maps[0];
      ptx::prefetch_map(&maps.k);
      ptx::prefetch_map(&maps.v);
      ptx::prefetch_map(&maps.q);
      ptx::prefetch_map(&maps.grad_out);
      ptx::prefetch_map(&maps.grad[0]);
      ptx::prefetch_map(&maps.grad[1]);
      init_kv_barriers<Config>(shared);
    }
    ptx::barrier_sync(start_barrier, L::threads);
    if constexpr (L::shares_registers) ptx::registers_up<L::consumer_registers>();
    KvConsumer<Config, Mma>{params, shared, warp * 32 / warpgroup_threads - 1}.run();
  }
}

}  // namespace gnaforge::sm90::backward
