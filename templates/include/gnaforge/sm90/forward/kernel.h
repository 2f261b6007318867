// The sm90 forward kernel. Warpgroup 0 loads: its first warp is the producer, of which one lane writes and copies.
// Warpgroups 1 to W compute: consumers 0 to W - 1. Device only.
//
// mbarriers, those of K and V one per stage of the ring. The producer's waits for *_empty pass at once the first time.
//   name      arrivals a phase                    by whom                                            who waits
//   q_full    1 and the bytes of Q                the producer, before the copies                    consumers
//   q_empty   4 W, if out_apart                   warps, when their last Q K^T is done               the producer
//             1, or W if out_by_warpgroup         else threads that stored, when what was Q is read  the producer
//   k_full    1 and the bytes of K                the producer, before the copies                    consumers
//   k_empty   4 W                                 warps, when their scores are in registers          the producer
//   v_full    1 and the bytes of V                the producer, before the copies                    consumers
//   v_empty   4 W                                 warps, when their product with V is done           the producer
// The producer writes q_facts and kv_facts before it arrives at q_full and k_full; they are read after the wait.
//
// Named barriers, counted in threads:
//   number            threads                   who syncs                                       who only arrives
//   start_barrier     all                       all, once mbarriers are there
//   turn_barrier + w  256, if W > 1             consumer w, before its products                 its predecessor, after
//   out_barrier + w   128, if out_by_warpgroup  consumer w, before and after it writes its output
//   out_barrier       128 W, else               all consumers, likewise
//   table_barrier     128 W                     all consumers, once padding is clear, if there is any; but for rank 1,
//                                               again once the table of masks is there
#pragma once

#include "gnaforge/sm90/forward/consumer.h"
#include "gnaforge/sm90/forward/producer.h"

namespace gnaforge::sm90 {

template <class Config>
__device__ __forceinline__ void init_barriers(ptx::SharedAddress shared) {
  using L = Layout<Config>;
  constexpr int warps = L::warpgroups * 4;
  constexpr int storing_threads = L::out_by_warpgroup ? L::warpgroups : 1;
  ptx::mbarrier_init(shared + L::q_full, 1);
  ptx::mbarrier_init(shared + L::q_empty, L::out_apart ? warps : storing_threads);
  for (int stage = 0; stage < L::stages; ++stage) {
    ptx::mbarrier_init(shared + L::k_full + 8 * stage, 1);
    ptx::mbarrier_init(shared + L::v_full + 8 * stage, 1);
    ptx::mbarrier_init(shared + L::k_empty + 8 * stage, warps);
    ptx::mbarrier_init(shared + L::v_empty + 8 * stage, warps);
  }
  ptx::fence_mbarrier_init();
}

template <int Threads>
__device__ __forceinline__ void clear(unsigned char* memory, int thread, int bytes) {
  for (int i = thread; i < bytes / 16; i += Threads) reinterpret_cast<uint4*>(memory)[i] = uint4{0, 0, 0, 0};
}

/// Clears what copies and products read but nobody writes: rows of Q beyond the tile, and channels of the output beyond
/// the last, but where Q comes to lie. What comes of them goes nowhere, but nothing should depend on what was in
/// memory. All consumers do, while the first tiles load.
template <class Config, class Mma>
__device__ __forceinline__ void clear_padding(unsigned char* memory) {
  using L = Layout<Config>;
  constexpr int volume = Config::QTile::volume, threads = L::warpgroups * warpgroup_threads;
  constexpr bool channels = L::value_head_dim % L::chunk_channels != 0 && (L::out_apart || L::v_chunks > L::qk_chunks);
  const int thread = static_cast<int>(threadIdx.x) - warpgroup_threads;
  if constexpr (volume < L::rows)
    for (int c = 0; c < L::qk_chunks; ++c)
      clear<threads>(memory + L::q_offset + c * L::q_chunk_bytes + volume * row_bytes, thread,
                     (L::rows - volume) * row_bytes);
  if constexpr (channels)
    clear<threads>(memory + L::out_offset + (L::v_chunks - 1) * L::q_chunk_bytes, thread, volume * row_bytes);
  if constexpr (volume < L::rows || channels) {
    ptx::fence_shared_to_async();
    ptx::barrier_sync(Consumer<Config, Mma>::table_barrier, threads);
  }
}

/// The number of lane 0, of which the compiler then knows that it is the same in all lanes: such numbers have registers
/// of their own.
__device__ __forceinline__ unsigned same_in_all_lanes(unsigned number) { return __shfl_sync(~0u, number, 0); }

template <class Config>
__device__ __forceinline__ void prefetch_maps(const Params<Config::QTile::rank>& params) {
  ptx::prefetch_map(&params.maps(0).q);
  ptx::prefetch_map(&params.maps(0).k);
  ptx::prefetch_map(&params.maps(0).v);
  ptx::prefetch_map(&params.maps(0).out);
}

template <class Config, class Mma>
__device__ __forceinline__ void forward(const Params<Config::QTile::rank>& params) {
  using L = Layout<Config>;
  extern __shared__ __align__(gpu::swizzle_bytes) unsigned char memory[];
  const ptx::SharedAddress shared = ptx::shared_address(memory);
  const int warp = static_cast<int>(same_in_all_lanes(threadIdx.x / 32));
  if (threadIdx.x < warpgroup_threads) {
    if constexpr (L::shares_registers) ptx::registers_down<L::producer_registers>();
    if (warp == 0)
      Producer<Config>{params, same_in_all_lanes(shared)}.run();
    else
      start<Config>();
  } else {
    if (threadIdx.x == warpgroup_threads) {  // the producer looks for its first Q tile meanwhile
      prefetch_maps<Config>(params);
      init_barriers<Config>(shared);
    }
    start<Config>();
    if constexpr (L::shares_registers) ptx::registers_up<L::consumer_registers>();
    clear_padding<Config, Mma>(memory);
    Consumer<Config, Mma>{params, shared, warp * 32 / warpgroup_threads - 1}.run();
  }
}

}  // namespace gnaforge::sm90
