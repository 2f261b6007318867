// The warp that loads: one lane issues the tensor copies of Q, K and V. Device only.
#pragma once

#include "gnaforge/gpu/work.h"
#include "gnaforge/ptx/barrier.h"
#include "gnaforge/ptx/mbarrier.h"
#include "gnaforge/ptx/registers.h"
#include "gnaforge/ptx/tma.h"
#include "gnaforge/sm90/forward/layout.h"

namespace gnaforge::sm90 {

/// A place in the ring of stages, and the parity of the barriers' phase there.
struct RingPosition {
  int stage;
  std::uint32_t parity;

  template <int Stages>
  __device__ __forceinline__ void advance() {
    if (++stage == Stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

constexpr int start_barrier = 0;  ///< The named barrier at which all threads meet, once.

template <class Config>
__device__ __forceinline__ void start() {
  ptx::barrier_sync(start_barrier, Layout<Config>::threads);
}

/// All lanes of the warp go through it together.
template <class Config>
struct Producer {
  using L = Layout<Config>;
  using Source = TileSource<Config>;
  using Work = gpu::Work<Source>;
  static constexpr int rank = L::rank;

  const gpu::Params<rank>& params;
  ptx::SharedAddress shared;
  bool leads = false;  ///< Whether this lane writes and copies.

  __device__ __forceinline__ Work find(int index) const {
    if constexpr (L::shares_axes)
      return Work(params, index, ptx::reload_thread_index());
    else
      return Work(params, index);
  }

  /// All chunks of one box, to `to`; `barrier` hears of `chunks * box_bytes` bytes.
  template <int Chunks>
  __device__ __forceinline__ void load(const CUtensorMap& map, ptx::SharedAddress barrier, ptx::SharedAddress to,
                                       int chunk_bytes, int box_bytes, int head_dim, int head, const int (&token)[rank],
                                       int batch) {
    ptx::mbarrier_arrive_expect(barrier, Chunks * box_bytes);
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      int at[gpu::map_rank(rank)];
      gpu::map_coordinates<rank>(at, params.folded, head_dim, c * L::chunk_channels, head, token, batch);
      ptx::tensor_load(to + c * chunk_bytes, &map, barrier, at);
    }
  }

  __device__ __forceinline__ void load_k(const Work& work, RingPosition at, const int (&origin)[rank], TileKind kind) {
    ptx::mbarrier_wait(shared + L::k_empty + 8 * at.stage, at.parity);
    if (!leads) return;
    gpu::KvTileFacts<rank>::store(shared + L::kv_facts + gpu::kv_facts_bytes * at.stage, origin, kind);
    load<L::qk_chunks>(params.maps[work.slice].k, shared + L::k_full + 8 * at.stage,
                       shared + L::k_offset + at.stage * L::k_bytes, L::kv_chunk_bytes, L::kv_chunk_bytes, L::head_dim,
                       work.kv_head, origin, work.batch);
  }

  __device__ __forceinline__ void load_v(const Work& work, RingPosition at, const int (&origin)[rank]) {
    ptx::mbarrier_wait(shared + L::v_empty + 8 * at.stage, at.parity);
    if (!leads) return;
    load<L::v_chunks>(params.maps[work.slice].v, shared + L::v_full + 8 * at.stage,
                      shared + L::v_offset + at.stage * L::v_bytes, L::kv_chunk_bytes, L::kv_chunk_bytes,
                      L::value_head_dim, work.kv_head, origin, work.batch);
  }

  __device__ __forceinline__ void load_q(const Work& work, std::uint32_t& parity) {
    ptx::mbarrier_wait(shared + L::q_empty, parity);
    parity ^= 1;
    if (!leads) return;
    gpu::QTileFacts<rank>::store(shared + L::q_facts + gpu::q_facts_bytes * parity, work);
    load<L::qk_chunks>(params.maps[work.slice].q, shared + L::q_full, shared + L::q_offset, L::q_chunk_bytes,
                       Config::QTile::volume * row_bytes, L::head_dim, work.head, work.q_begin, work.batch);
  }

  __device__ __forceinline__ void run() {
    int index = blockIdx.x;
    Work work = find(index);  // while the barriers come to be
    start<Config>();
    // The launch may have begun before the one before it ended. No consumer touches tensors before it has seen a load.
    ptx::wait_for_grids();
    leads = ptx::elect();
    // A wait for the phase before the first returns at once: every stage is empty.
    RingPosition at{0, 1};
    std::uint32_t q_parity = 1;
    for (;;) {
      typename Source::Walk walk;
      walk.begin(work.list);
      int j = 0;
      do {
        int origin[rank];
#pragma unroll
        for (int d = 0; d < rank; ++d) origin[d] = Source::origin(work.list, walk, d);
        load_k(work, at, origin, Source::kind(work.list, j));
        // The first K is under way before Q waits for the last tile's output to leave.
        if (j == 0) load_q(work, q_parity);
        load_v(work, at, origin);
        __syncwarp();  // a lane two phases behind would take this phase of a barrier for an earlier one
        at.template advance<L::stages>();
        if (++j < work.list.count) walk.step(work.list, j);
      } while (j < work.list.count);
      index += gridDim.x;
      if (index >= params.tiles()) break;
      work = find(index);
    }
  }
};

}  // namespace gnaforge::sm90
