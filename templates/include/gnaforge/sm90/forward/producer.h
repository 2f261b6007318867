// The warp that loads: one lane issues the tensor copies of Q, K and V. Device only.
#pragma once

#include "gnaforge/gpu/calls_work.h"
#include "gnaforge/gpu/lane_tiles.h"
#include "gnaforge/gpu/ring.h"
#include "gnaforge/ptx/barrier.h"
#include "gnaforge/sm90/forward/layout.h"

namespace gnaforge::sm90 {

using gpu::LaneTiles;
using gpu::RingPosition;

constexpr int start_barrier = 0;  ///< The named barrier at which all threads meet, once.

template <class Config>
__device__ __forceinline__ void start() {
  ptx::barrier_sync(start_barrier, Layout<Config>::threads);
}

/// All lanes of the warp go through it together.
template <class Config>
struct Producer {
  using L = Layout<Config>;
  using Tiles = LaneTiles<TileSource<Config>>;
  using Place = gpu::CallsPlace<typename Config::QTile>;
  using ExtraKeys = gpu::ExtraKeys<L, Params<L::rank>, typename Config::QTile>;
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

  /// Leaves the first `count` columns in the table of masks; returns what consumers are told of them. Nobody reads
  /// those of the Q tile before any more: this one's Q has waited for that.
  __device__ __forceinline__ int note_part(int piece, int count) const {
    using Columns = typename L::Columns;
    if constexpr (rank == 1) {
      return count;
    } else {
      const int thread = lane(), entry = Columns::part_entry(piece);
      if (thread < 4 * Columns::words) {
        const int own = Columns::count_below(count, thread / Columns::words) - 32 * (thread % Columns::words);
        ptx::store_shared_word(shared + L::mask_table + entry * Columns::entry_bytes + 4 * thread, ~bits_from(own));
      }
      return entry;
    }
  }

  /// All tiles of all pieces.
  __device__ __forceinline__ void load_extra_keys(const Place& work, RingPosition& at) {
    const ExtraKeys keys{params, work};
#pragma unroll 1
    for (int piece = 0; piece < params.call(work.slice).extra_pieces; ++piece) {
      int left = keys.length(piece);
#pragma unroll 1
      for (int first = 0; left > 0; first += L::columns, left -= L::columns) {
        ptx::mbarrier_wait(shared + L::k_empty + 8 * at.stage, at.parity);
        const bool whole = left >= L::columns;
        gpu::KvTileFacts<rank>::store(shared + L::kv_facts + gpu::kv_facts_bytes * at.stage, lane(),
                                      whole ? 0 : note_part(piece, left), whole ? TileKind::interior : TileKind::part);
        __syncwarp();
        if (leads)
          keys.template load<L::qk_chunks>(2 * piece, params.extra_maps(work.slice).k[piece],
                                           shared + L::k_full + 8 * at.stage,
                                           shared + L::k_offset + at.stage * L::k_bytes, first);
        ptx::mbarrier_wait(shared + L::v_empty + 8 * at.stage, at.parity);
        if (leads)
          keys.template load<L::v_chunks>(2 * piece + 1, params.extra_maps(work.slice).v[piece],
                                          shared + L::v_full + 8 * at.stage,
                                          shared + L::v_offset + at.stage * L::v_bytes, first);
        at.template advance<L::stages>();
      }
    }
  }

  __device__ __forceinline__ void load_q(const Place& work, const Tiles& tiles, std::uint32_t& parity) {
    ptx::mbarrier_wait(shared + L::q_empty, parity);
    parity ^= 1;
    const int extra = ExtraKeys{params, work}.tiles();
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
        if (j == 0) load_q(work, tiles, q_parity);
        load_v(work, at, token);
        at.template advance<L::stages>();
        if (++j < tiles.count) tiles.step(j);
      } while (j < tiles.count);
      load_extra_keys(work, at);
      index += gridDim.x;
      if (index >= params.tiles()) break;
      work = Place(params, index);
      tiles = Tiles(params, work, shared + L::sides);
    }
  }
};

}  // namespace gnaforge::sm90
