// The sm90 forward kernel. Warpgroup 0 loads: its first thread is the producer. Warpgroups 1 to W compute: consumers 0
// to W - 1. Device only.
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
//   0, __syncthreads  all                       all, once barriers are there and padding is clear
//   turn_barrier + w  256, if W > 1             consumer w, before its products                 its predecessor, after
//   out_barrier + w   128, if out_by_warpgroup  consumer w, before and after it writes its output
//   out_barrier       128 W, else               all consumers, likewise
//   table_barrier     128 W, but for rank 1     all consumers, once the table of masks is there
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
__device__ __forceinline__ void clear(unsigned char* memory, int bytes) {
  for (int i = threadIdx.x; i < bytes / 16; i += Threads) reinterpret_cast<uint4*>(memory)[i] = uint4{0, 0, 0, 0};
}

/// Clears what copies read but nobody writes: rows of Q beyond the tile, and channels of the output beyond the last.
/// What comes of them goes nowhere, but nothing should depend on what was in memory.
template <class Config>
__device__ __forceinline__ void clear_padding(unsigned char* memory) {
  using L = Layout<Config>;
  constexpr int volume = Config::QTile::volume;
  constexpr bool channels = L::value_head_dim % L::chunk_channels != 0;
  if constexpr (volume < L::rows)
    for (int c = 0; c < L::qk_chunks; ++c)
      clear<L::threads>(memory + L::q_offset + c * L::q_chunk_bytes + volume * row_bytes,
                        (L::rows - volume) * row_bytes);
  if constexpr (channels)
    clear<L::threads>(memory + L::out_offset + (L::v_chunks - 1) * L::q_chunk_bytes, volume * row_bytes);
  if constexpr (volume < L::rows || channels) ptx::fence_shared_to_async();
}

template <class Config, class Mma>
__device__ __forceinline__ void forward(const gpu::Params<Config::QTile::rank>& params) {
  using L = Layout<Config>;
  extern __shared__ __align__(gpu::swizzle_bytes) unsigned char memory[];
  const ptx::SharedAddress shared = ptx::shared_address(memory);
  if (threadIdx.x == 0) {
    ptx::prefetch_map(&params.maps[0].q);
    ptx::prefetch_map(&params.maps[0].k);
    ptx::prefetch_map(&params.maps[0].v);
    ptx::prefetch_map(&params.maps[0].out);
    init_barriers<Config>(shared);
  }
  clear_padding<Config>(memory);
  __syncthreads();
  // The same in all lanes, and so the compiler knows.
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / warpgroup_threads, 0);
  if (warpgroup == 0) {
    if constexpr (L::shares_registers) ptx::registers_down<L::producer_registers>();
    if (threadIdx.x == 0) Producer<Config>{params, shared}.run();
  } else {
    if constexpr (L::shares_registers) ptx::registers_up<L::consumer_registers>();
    Consumer<Config, Mma>{params, shared, warpgroup - 1}.run();
  }
}

}  // namespace gnaforge::sm90
