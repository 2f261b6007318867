// Extra keys on their way to the warpgroups that compute: whole tiles of them need no mask. Device only.
#pragma once

#include "gnaforge/gpu/work.h"
#include "gnaforge/ptx/mbarrier.h"
#include "gnaforge/ptx/registers.h"
#include "gnaforge/ptx/tma.h"
#include "gnaforge/sm90/extra_keys.h"
#include "gnaforge/sm90/ring_position.h"

namespace gnaforge::sm90 {

/// How many keys of a piece count for a batch entry of a call.
__device__ __forceinline__ int extra_length(const ExtraKeys& keys, int piece, std::int64_t batch) {
  const int tokens = keys.tokens[piece];
  const int* const lengths = keys.lengths[piece];
  if (lengths == nullptr) return tokens;
  return clamp_int(ptx::load_word(lengths + batch * keys.lengths_stride[piece]), 0, tokens);
}

/// Loads `Chunks` chunks of the box of keys from `first` on, `chunk_bytes` apart from `to` on. `batch` is an entry of
/// the call's, `repeated` whether the map has one for all. `barrier` hears of the bytes.
template <class L, int Chunks>
__device__ __forceinline__ void load_extra_box(const CUtensorMap& map, bool repeated, ptx::SharedAddress barrier,
                                               ptx::SharedAddress to, int chunk_bytes, int kv_head, int first,
                                               int batch) {
#pragma unroll
  for (int c = 0; c < Chunks; ++c) {
    const int at[4] = {c * L::chunk_channels, kv_head, first, repeated ? 0 : batch};
    ptx::tensor_load(to + c * chunk_bytes, &map, barrier, at);
  }
}

/// What the warp that loads K and V in a ring of stages does for a Q tile's extra keys. `L` is the kernel's layout,
/// `Params` its parameters, which have extra(slice), extra_maps(slice) and first_batch(slice). `ClearsRest`: in a tile
/// that isn't whole, rows of keys that don't count become zeros, for products multiply them with probabilities of 0 and
/// must find nothing infinite; that takes a barrier of its own, L::part_full. Bit 1 of the caller's `parities` is that
/// of the phase which the next such tile ends: registers are few.
template <class L, class Params, bool ClearsRest>
struct ExtraLoads {
  static constexpr int rank = L::rank;

  const Params& params;
  ptx::SharedAddress shared;

  static __device__ __forceinline__ int lane() { return ptx::reload_thread_index(); }

  template <class Place>
  __device__ __forceinline__ int length(const Place& work, int piece) const {
    return extra_length(params.extra(work.slice), piece, std::int64_t{params.first_batch(work.slice)} + work.batch);
  }

  /// Of all pieces.
  template <class Place>
  __device__ __forceinline__ int tiles(const Place& work) const {
    int tiles = 0;
#pragma unroll 1
    for (int piece = 0; piece < params.extra(work.slice).pieces; ++piece)
      tiles += (length(work, piece) + L::columns - 1) / L::columns;
    return tiles;
  }

  /// Loads all tiles of all pieces; all lanes of the block's first warp go through it together, of which one `leads`.
  template <class Place>
  __device__ __forceinline__ void load(const Place& work, RingPosition& at, bool leads, std::uint32_t& parities) const {
#pragma unroll 1
    for (int piece = 0; piece < params.extra(work.slice).pieces; ++piece) {
      int left = length(work, piece);
#pragma unroll 1
      for (int first = 0; left > 0; first += L::columns, left -= L::columns) {
        ptx::mbarrier_wait(shared + L::k_empty + 8 * at.stage, at.parity);
        const bool whole = left >= L::columns;
        gpu::KvTileFacts<rank>::store(shared + L::kv_facts + gpu::kv_facts_bytes * at.stage, lane(),
                                      whole ? 0 : note_part(piece, left), whole ? TileKind::interior : TileKind::part);
        __syncwarp();
        load_tile<L::qk_chunks>(work, 2 * piece, params.extra_maps(work.slice).k[piece],
                                shared + L::k_full + 8 * at.stage, shared + L::k_offset + at.stage * L::k_bytes, first,
                                left, leads, parities);
        ptx::mbarrier_wait(shared + L::v_empty + 8 * at.stage, at.parity);
        load_tile<L::v_chunks>(work, 2 * piece + 1, params.extra_maps(work.slice).v[piece],
                               shared + L::v_full + 8 * at.stage, shared + L::v_offset + at.stage * L::v_bytes, first,
                               left, leads, parities);
        at.template advance<L::stages>();
      }
    }
  }

 private:
  /// All chunks of the tile from key `first` on, of whose keys `count` count; `full` hears when they are there.
  template <int Chunks, class Place>
  __device__ __forceinline__ void load_tile(const Place& work, int bit, const CUtensorMap& map, ptx::SharedAddress full,
                                            ptx::SharedAddress to, int first, int count, bool leads,
                                            std::uint32_t& parities) const {
    const bool clears = ClearsRest && count < L::columns;
    if (leads) {
      const ptx::SharedAddress barrier = clears ? shared + part_full() : full;
      ptx::mbarrier_arrive_expect(barrier, Chunks * L::kv_chunk_bytes);
      load_extra_box<L, Chunks>(map, params.extra(work.slice).repeated >> bit & 1, barrier, to, L::kv_chunk_bytes,
                                work.kv_head, first, params.first_batch(work.slice) + work.batch);
    }
    if (clears) {
      ptx::mbarrier_wait(shared + part_full(), parities >> 1);
      parities ^= 2;
      clear_rest<Chunks>(to, count);
      if (leads) ptx::mbarrier_arrive(full);
    }
  }

  static __device__ __forceinline__ constexpr int part_full() {
    if constexpr (ClearsRest)
      return L::part_full;
    else
      return 0;
  }

  /// Rows from `count` on.
  template <int Chunks>
  static __device__ __forceinline__ void clear_rest(ptx::SharedAddress tile, int count) {
    const int bytes = (L::columns - count) * gpu::row_bytes;
#pragma unroll 1
    for (int chunk = 0; chunk < Chunks; ++chunk)
#pragma unroll 1
      for (int i = 16 * lane(); i < bytes; i += 16 * 32)
        ptx::store_shared(tile + chunk * L::kv_chunk_bytes + count * gpu::row_bytes + i, 0, 0, 0, 0);
    ptx::fence_shared_to_async();
    __syncwarp();
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
};

}  // namespace gnaforge::sm90
