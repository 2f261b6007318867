// The warp that loads: one lane issues the tensor copies of Q, K and V. Device only.
#pragma once

#include "gnaforge/gpu/work.h"
#include "gnaforge/ptx/barrier.h"
#include "gnaforge/ptx/mbarrier.h"
#include "gnaforge/ptx/registers.h"
#include "gnaforge/ptx/tma.h"
#include "gnaforge/sm90/extra_loads.h"
#include "gnaforge/sm90/forward/lane_tiles.h"
#include "gnaforge/sm90/forward/layout.h"
#include "gnaforge/sm90/forward/params.h"
#include "gnaforge/sm90/ring_position.h"

namespace gnaforge::sm90 {

constexpr int start_barrier = 0;  ///< The named barrier at which all threads meet, once.

template <class Config>
__device__ __forceinline__ void start() {
  ptx::barrier_sync(start_barrier, Layout<Config>::threads);
}

/// A Q tile whose heads are counted among those of its slice's maps.
template <class QTile>
struct Place : gpu::Place<QTile> {
  __device__ __forceinline__ Place(const Params<QTile::rank>& params, int index) : gpu::Place<QTile>(params, index) {
    this->head += params.slices[this->slice].first_head;
    this->kv_head += params.slices[this->slice].first_kv_head;
  }
};

/// All lanes of the warp go through it together.
template <class Config>
struct Producer {
  using L = Layout<Config>;
  using Tiles = LaneTiles<TileSource<Config>>;
  using Place = sm90::Place<typename Config::QTile>;
  using Extra = ExtraLoads<L, Params<L::rank>, false>;
  static constexpr int rank = L::rank;

  const Params<rank>& params;
  ptx::SharedAddress shared;
  bool leads = false;  ///< Whether this lane copies.

  static __device__ __forceinline__ int lane() { return ptx::reload_thread_index(); }

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

  /// `origin` and `token` are the lane's and all axes' first row of the tile, where it is and where it is stored.
  __device__ __forceinline__ void load_k(const Place& work, RingPosition at, int origin, TileKind kind,
                                         const int (&token)[rank]) {
    ptx::mbarrier_wait(shared + L::k_empty + 8 * at.stage, at.parity);
    gpu::KvTileFacts<rank>::store(shared + L::kv_facts + gpu::kv_facts_bytes * at.stage, lane(), origin, kind);
    // What they wrote is there before the leader arrives. And a lane two phases behind would take this phase of a
    // barrier for an earlier one.
    __syncwarp();
    if (!leads) return;
    load<L::qk_chunks>(params.maps(work.slice).k, shared + L::k_full + 8 * at.stage,
                       shared + L::k_offset + at.stage * L::k_bytes, L::kv_chunk_bytes, L::kv_chunk_bytes, L::head_dim,
                       work.kv_head, token, work.batch);
  }

  __device__ __forceinline__ void load_v(const Place& work, RingPosition at, const int (&token)[rank]) {
    ptx::mbarrier_wait(shared + L::v_empty + 8 * at.stage, at.parity);
    if (!leads) return;
    load<L::v_chunks>(params.maps(work.slice).v, shared + L::v_full + 8 * at.stage,
                      shared + L::v_offset + at.stage * L::v_bytes, L::kv_chunk_bytes, L::kv_chunk_bytes,
                      L::value_head_dim, work.kv_head, token, work.batch);
  }

  __device__ __forceinline__ void load_q(const Place& work, const Tiles& tiles, const Extra& extra_keys,
                                         std::uint32_t& parity) {
    ptx::mbarrier_wait(shared + L::q_empty, parity);
    parity ^= 1;
    const int extra = extra_keys.tiles(work);
    if (!leads) return;
    gpu::QTileFacts<rank>::store(shared + L::q_facts + gpu::q_facts_bytes * parity, work, tiles.count + extra,
                                 tiles.interior + extra);
    load<L::qk_chunks>(params.maps(work.slice).q, shared + L::q_full, shared + L::q_offset, L::q_chunk_bytes,
                       Config::QTile::volume * row_bytes, L::head_dim, work.head, work.q_begin, work.batch);
  }

  __device__ __forceinline__ void run() {
    int index = blockIdx.x;
    Place work(params, index);  // while the barriers come to be
    Tiles tiles(params, work, shared + L::sides);
    start<Config>();
    // The launch may have begun before the one before it ended. No consumer touches tensors before it has seen a load.
    ptx::wait_for_grids();
    leads = ptx::elect();
    Extra extra_keys{params, shared};
    // A wait for the phase before the first returns at once: every stage is empty.
    RingPosition at{0, 1};
    std::uint32_t q_parity = 1;
    for (;;) {
      int j = 0;
      do {
        const typename Tiles::Spot spot = tiles.spot(params, shared + L::sides);
        int token[rank];
#pragma unroll
        for (int d = 0; d < rank; ++d) token[d] = Tiles::from_axis(spot.stored, d);
        const TileKind kind = j < tiles.interior ? TileKind::interior
                              : spot.below       ? TileKind::shell_below
                                                 : TileKind::shell;
        load_k(work, at, spot.origin, kind, token);
        // The first K is under way before Q waits for the last tile's output to leave.
        if (j == 0) load_q(work, tiles, extra_keys, q_parity);
        load_v(work, at, token);
        at.template advance<L::stages>();
        if (++j < tiles.count) tiles.step(j);
      } while (j < tiles.count);
      extra_keys.load(work, at, leads, q_parity);
      index += gridDim.x;
      if (index >= params.tiles()) break;
      work = Place(params, index);
      tiles = Tiles(params, work, shared + L::sides);
    }
  }
};

}  // namespace gnaforge::sm90
