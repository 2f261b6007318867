// The warp of backward_q that loads: Q and the output's gradient once a tile, K and V in a ring. Device only.
#pragma once

#include "gnaforge/gpu/copy.h"
#include "gnaforge/ptx/barrier.h"
#include "gnaforge/ptx/mbarrier.h"
#include "gnaforge/ptx/registers.h"
#include "gnaforge/sm90/backward/params.h"
#include "gnaforge/sm90/backward/q_layout.h"
#include "gnaforge/sm90/extra_loads.h"
#include "gnaforge/sm90/forward/lane_tiles.h"
#include "gnaforge/sm90/forward/producer.h"
#include "gnaforge/sm90/ring_position.h"

namespace gnaforge::sm90::backward {

/// All lanes of the warp go through it together.
template <class Config>
struct QProducer {
  using L = QLayout<Config>;
  using Tiles = LaneTiles<TileSource<Config>>;
  using Place = gpu::Place<typename Config::QTile>;
  using Extra = ExtraLoads<L, Params<L::rank>, true>;
  static constexpr int rank = L::rank;

  const Params<rank>& params;
  ptx::SharedAddress shared;
  bool leads = false;  ///< Whether this lane copies.

  /// `origin` and `token` are the lane's and all axes' first row of the tile, where it is and where it is stored.
  __device__ __forceinline__ void load_k(const Place& work, RingPosition at, int origin, TileKind kind,
                                         const int (&token)[rank]) {
    ptx::mbarrier_wait(shared + L::k_empty + 8 * at.stage, at.parity);
    gpu::KvTileFacts<rank>::store(shared + L::kv_facts + gpu::kv_facts_bytes * at.stage, ptx::reload_thread_index(),
                                  origin, kind);
    // What they wrote is there before the leader arrives, and no lane takes this phase of a barrier for an earlier one.
    __syncwarp();
    if (!leads) return;
    const ptx::SharedAddress full = shared + L::k_full + 8 * at.stage;
    ptx::mbarrier_arrive_expect(full, L::k_bytes);
    gpu::load_box<L, L::qk_chunks>(params.maps[work.slice].k, params.folded, full,
                                   shared + L::k_offset + at.stage * L::k_bytes, L::kv_chunk_bytes, L::head_dim,
                                   work.kv_head, token, work.batch);
  }

  __device__ __forceinline__ void load_v(const Place& work, RingPosition at, const int (&token)[rank]) {
    ptx::mbarrier_wait(shared + L::v_empty + 8 * at.stage, at.parity);
    if (!leads) return;
    const ptx::SharedAddress full = shared + L::v_full + 8 * at.stage;
    ptx::mbarrier_arrive_expect(full, L::v_bytes);
    gpu::load_box<L, L::v_chunks>(params.maps[work.slice].v, params.folded, full,
                                  shared + L::v_offset + at.stage * L::v_bytes, L::kv_chunk_bytes, L::value_head_dim,
                                  work.kv_head, token, work.batch);
  }

  __device__ __forceinline__ void load_q(const Place& work, const Tiles& tiles, const Extra& extra_keys,
                                         std::uint32_t& parities) {
    ptx::mbarrier_wait(shared + L::q_empty, parities & 1);
    parities ^= 1;
    const int extra = extra_keys.tiles(work);
    if (!leads) return;
    gpu::QTileFacts<rank>::store(shared + L::q_facts + gpu::q_facts_bytes * (parities & 1), work, tiles.count + extra,
                                 tiles.interior + extra);
    const ptx::SharedAddress full = shared + L::q_full;
    ptx::mbarrier_arrive_expect(full, (L::qk_chunks + L::v_chunks) * Config::QTile::volume * row_bytes);
    gpu::load_box<L, L::qk_chunks>(params.maps[work.slice].q, params.folded, full, shared + L::q_offset,
                                   L::q_chunk_bytes, L::head_dim, work.head, work.q_begin, work.batch);
    gpu::load_box<L, L::v_chunks>(params.maps[work.slice].grad_out, params.folded, full, shared + L::grad_out_offset,
                                  L::q_chunk_bytes, L::value_head_dim, work.head, work.q_begin, work.batch);
  }

  /// `start` is where all threads meet, once barriers are there.
  template <class Start>
  __device__ __forceinline__ void run(const Start& start) {
    int index = blockIdx.x;
    Place work(params, index);  // while the barriers come to be
    Tiles tiles(params, work, shared + L::sides);
    start();
    // The launch may have begun before the one before it ended. No consumer touches tensors before it has seen a load.
    ptx::wait_for_grids();
    leads = ptx::elect();
    Extra extra_keys{params, shared};
    // A wait for the phase before the first returns at once: every stage is empty.
    RingPosition at{0, 1};
    std::uint32_t parities = 1;  // bit 0: of Q, bit 1: of extra keys that aren't whole tiles
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
        // The first K is under way before Q waits for the last tile's gradient to leave.
        if (j == 0) load_q(work, tiles, extra_keys, parities);
        load_v(work, at, token);
        at.template advance<L::stages>();
        if (++j < tiles.count) tiles.step(j);
      } while (j < tiles.count);
      extra_keys.load(work, at, leads, parities);
      index += gridDim.x;
      if (index >= params.tiles()) break;
      work = Place(params, index);
      tiles = Tiles(params, work, shared + L::sides);
    }
  }
};

}  // namespace gnaforge::sm90::backward
