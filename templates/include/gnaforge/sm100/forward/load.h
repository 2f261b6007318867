// The warp that loads, and that alone knows where tiles come from: one lane issues the tensor copies. Device only.
#pragma once

#include "gnaforge/gpu/calls_work.h"
#include "gnaforge/gpu/copy.h"
#include "gnaforge/gpu/extra_tiles.h"
#include "gnaforge/gpu/lane_tiles.h"
#include "gnaforge/gpu/ring.h"
#include "gnaforge/ptx/registers.h"
#include "gnaforge/sm100/forward/facts.h"

namespace gnaforge::sm100 {

/// All lanes of the warp go through it together.
template <class Config>
struct Load {
  using L = Layout<Config>;
  using Tiles = gpu::LaneTiles<TileSource<Config>>;
  using Place = gpu::CallsPlace<typename Config::QTile, L::heads>;
  using ExtraTiles = gpu::ExtraTiles<L, Params<Config>>;
  using KvTileFacts = gpu::KvTileFacts<L::rank>;
  static constexpr int rank = L::rank;

  const Params<Config>& params;
  ptx::SharedAddress shared;
  bool leads = false;          ///< Whether this lane copies.
  gpu::RingPosition at{0, 1};  ///< A wait for the phase before the first returns at once: every stage is empty.
  int kv_slot = 0;
  std::uint32_t q_parity = 1;

  static __device__ __forceinline__ int lane() { return ptx::reload_thread_index(); }

  __device__ __forceinline__ ptx::SharedAddress full() const { return shared + L::kv_full + 8 * at.stage; }
  __device__ __forceinline__ ptx::SharedAddress stage() const {
    return shared + L::kv_offset + at.stage * L::stage_bytes;
  }
  /// No lane takes this phase of the barrier for an earlier one: they go on together.
  __device__ __forceinline__ void await_stage() const {
    ptx::mbarrier_wait(shared + L::kv_empty + 8 * at.stage, at.parity);
    __syncwarp();
  }

  /// Tells of the KV tile whose K is next; `origin` is the lane's.
  __device__ __forceinline__ void tell(int origin, TileKind kind) {
    KvTileFacts::store(shared + L::kv_facts + gpu::kv_facts_bytes * kv_slot, lane(), origin, kind);
    __syncwarp();
    if (leads) ptx::mbarrier_arrive(shared + L::kv_facts_full + 8 * kv_slot);
    kv_slot = (kv_slot + 1) % L::kv_facts_slots;
  }

  /// All chunks of a box of K or V to the ring.
  template <int Chunks>
  __device__ __forceinline__ void load(const CUtensorMap& map, const Place& work, int head_dim,
                                       const int (&token)[rank]) {
    if (leads) {
      ptx::mbarrier_arrive_expect(full(), Chunks * L::kv_box_bytes);
      gpu::load_box<L, Chunks>(map, params.folded, full(), stage(), L::kv_chunk_bytes, head_dim, work.kv_head, token,
                               work.batch);
    }
    at.template advance<L::stages>();
  }

  __device__ __forceinline__ void load_q(const Place& work, int half) const {
    if (!leads) return;
    int token[rank];
#pragma unroll
    for (int d = 0; d < rank; ++d) token[d] = work.q_begin[d] + L::Half::begin(half, d);
    const ptx::SharedAddress barrier = shared + L::q_full + 8 * half;
    ptx::mbarrier_arrive_expect(barrier, L::qk_chunks * L::half_queries * row_bytes);
    gpu::load_box<L, L::qk_chunks>(params.maps(work.slice).q, params.folded, barrier,
                                   shared + L::q_offset + half * L::half_bytes, L::q_chunk_bytes, L::head_dim,
                                   work.head, token, work.batch);
  }

  /// Q of both halves, each when the last product with the one before is done, and the facts.
  __device__ __forceinline__ void load_q(const Place& work, const Tiles& tiles, QTiles<Config>& facts) {
    const int extra = ExtraTiles{params}.tiles(work);
    await_q(0);
    ShortFacts shorter{};
    if constexpr (L::Short::any) {
      shorter.columns = L::Short::enough(tiles.rows_of_last() * L::Short::row);
      shorter.end = tiles.count;
      shorter.begin = tiles.count - (shorter.columns < L::columns ? tiles.layer : 0);
    }
    if (leads) facts.put(work, tiles.count + extra, tiles.interior, shorter);
    load_q(work, 0);
    if constexpr (L::halves > 1) {
      await_q(1);
      load_q(work, 1);
    }
    q_parity ^= 1;
  }

  __device__ __forceinline__ void await_q(int half) const {
    ptx::mbarrier_wait(shared + L::q_empty + 8 * half, q_parity);
    __syncwarp();
  }

  /// All tiles of all pieces.
  __device__ __forceinline__ void load_extra_keys(const Place& work) {
    const ExtraTiles keys{params};
#pragma unroll 1
    for (int piece = 0; piece < params.extra(work.slice).pieces; ++piece) {
      int left = keys.length(work, piece);
#pragma unroll 1
      for (int first = 0; left > 0; first += L::columns, left -= L::columns) {
        await_stage();
        tell(left, left >= L::columns ? TileKind::interior : TileKind::part);
        if (leads)
          keys.template load_box<L::qk_chunks>(work, 2 * piece, params.extra_maps(work.slice).k[piece], full(), stage(),
                                               first);
        at.template advance<L::stages>();
        await_stage();
        if (leads)
          keys.template load_box<L::v_chunks>(work, 2 * piece + 1, params.extra_maps(work.slice).v[piece], full(),
                                              stage(), first);
        at.template advance<L::stages>();
      }
    }
  }

  __device__ __forceinline__ void run() {
    int index = blockIdx.x;
    Place work(params, index);
    Tiles tiles(params, work, shared + L::sides);
    QTiles<Config> facts{shared};
    // The launch may have begun before the one before it ended. Others touch tensors only once they have seen a load.
    ptx::wait_for_grids();
    leads = ptx::elect();
    for (;;) {
      int j = 0;
      do {
        const typename Tiles::Spot spot = tiles.spot(params, shared + L::sides);
        int token[rank];
#pragma unroll
        for (int d = 0; d < rank; ++d) token[d] = Tiles::from_axis(spot.stored, d);
        await_stage();
        tell(spot.origin, j < tiles.interior ? TileKind::interior
                          : spot.below       ? TileKind::shell_below
                                             : TileKind::shell);
        load<L::qk_chunks>(params.maps(work.slice).k, work, L::head_dim, token);
        // The first K is under way before Q waits for the last tile's products.
        if (j == 0) load_q(work, tiles, facts);
        await_stage();
        load<L::v_chunks>(params.maps(work.slice).v, work, L::value_head_dim, token);
        if (++j < tiles.count) tiles.step(j);
      } while (j < tiles.count);
      load_extra_keys(work);
      index += gridDim.x;
      if (index >= params.tiles()) break;
      work = Place(params, index);
      tiles = Tiles(params, work, shared + L::sides);
    }
    await_q(0);  // as before a further Q tile: its slot of facts is free
    if (leads) facts.put(work, 0, 0, {});
  }
};

}  // namespace gnaforge::sm100
