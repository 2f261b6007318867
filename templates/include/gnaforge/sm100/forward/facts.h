// What the load warp tells the others of Q tiles and KV tiles, by slots of shared memory. Device only.
#pragma once

#include "gnaforge/gpu/work.h"
#include "gnaforge/ptx/mbarrier.h"
#include "gnaforge/sm100/forward/layout.h"

namespace gnaforge::sm100 {

/// The KV tiles of a Q tile of which fewer columns are computed: the window's last ones.
struct ShortFacts {
  int begin, end;  ///< Which ones.
  int columns;

  /// Of the `j`th KV tile.
  __device__ __forceinline__ int columns_of(int j, int all) const { return j >= begin && j < end ? columns : all; }

  /// Beside the Q tile's facts.
  __device__ __forceinline__ void store(ptx::SharedAddress slot) const {
    ptx::store_shared(slot + gpu::q_facts_bytes, begin, end, columns, 0);
  }
  static __device__ __forceinline__ ShortFacts of(ptx::SharedAddress slot) {
    const int4 words = ptx::load_shared(slot + gpu::q_facts_bytes);
    return {words.x, words.y, words.z};
  }
};

/// The Q tiles of a thread block, one after the other, as a role goes through them. After the last one comes one that
/// has no KV tiles.
template <class Config>
struct QTiles {
  using L = Layout<Config>;
  using Facts = gpu::QTileFacts<L::rank>;

  ptx::SharedAddress shared;
  int slot = 0;
  std::uint32_t parity = 0;

  /// Waits for the next one; returns where its facts are, until the block has gone through three more.
  __device__ __forceinline__ ptx::SharedAddress next() {
    ptx::mbarrier_wait(shared + L::q_facts_full + 8 * slot, parity);
    const ptx::SharedAddress at = shared + L::q_facts + L::q_slot_bytes * slot;
    advance();
    return at;
  }

  /// Tells of the next one. By one thread.
  __device__ __forceinline__ void put(const gpu::Place<typename Config::QTile>& place, int count, int interior,
                                      const ShortFacts& shorter) {
    const ptx::SharedAddress to = shared + L::q_facts + L::q_slot_bytes * slot;
    if constexpr (L::Short::any) shorter.store(to);
    Facts::store(to, place, count, interior);
    ptx::mbarrier_arrive(shared + L::q_facts_full + 8 * slot);
    advance();
  }

  /// Goes past one.
  __device__ __forceinline__ void advance() {
    if (++slot == L::q_facts_slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

/// Where the facts of the KV tile are that is the `number`th of the thread block, once they are there.
template <class Config>
__device__ __forceinline__ gpu::KvTileFacts<Layout<Config>::rank> await_kv_facts(ptx::SharedAddress shared,
                                                                                 std::uint32_t number) {
  using L = Layout<Config>;
  const int slot = number % L::kv_facts_slots;
  ptx::mbarrier_wait(shared + L::kv_facts_full + 8 * slot, number / L::kv_facts_slots % 2);
  return gpu::KvTileFacts<L::rank>::load(shared + L::kv_facts + gpu::kv_facts_bytes * slot);
}

/// One arrival of a warp.
__device__ __forceinline__ void release(ptx::SharedAddress barrier) {
  if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
}

}  // namespace gnaforge::sm100
