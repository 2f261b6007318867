// What example 88's mainloop asks of a mask: how many KV tiles there are, how many of them need none, and the masking.
// Device only.
#pragma once

#include <cute/tensor.hpp>

#include <utility>

#include "gnaforge/sm90/cutlass/layout.h"
#include "gnaforge/sm90/forward/fragment_mask.h"

namespace gnaforge::sm90_cutlass {

/// A half of a Q tile as a box of its own, which is what a warpgroup's mask knows.
template <class Config, int... Axes>
Box<Layout<Config>::Half::extent(Axes)...> half_box(std::integer_sequence<int, Axes...>);
template <class Config>
using HalfOf = decltype(half_box<Config>(std::make_integer_sequence<int, Config::QTile::rank>{}));

/// One warpgroup's half of a Q tile. The mainloop hands it through to the mask, as its problem shape.
template <class Config>
struct Problem {
  const gpu::Params<Config::QTile::rank>* params;
  ptx::SharedAddress kv_facts, mask_table;
  int first;  ///< Of the KV tiles since launch, this Q tile's first.
  int interior, count;
  sm90::RowWindows<HalfOf<Config>, TileSource<Config>> windows;
};

/// The mainloop makes a fresh one for each question. It asks of the first tile whatever it is, then of those beyond the
/// unmasked ones.
template <class Config>
struct Mask {
  using KvTile = typename Config::KvTile;
  using KvTileFacts = gpu::KvTileFacts<KvTile::rank>;

  template <class Block, class Tile>
  __device__ __forceinline__ int get_unmasked_trip_count(const Block&, const Tile&, const Problem<Config>& own) const {
    return own.interior;
  }

  template <class Block, class Tile>
  __device__ __forceinline__ int get_masked_trip_count(const Block&, const Tile&, const Problem<Config>& own) const {
    return own.count - own.interior;
  }

  /// `scores` is the warpgroup's accumulator; of `index` only the column says something: where the tile is in the list.
  template <class Scores, class Index>
  __device__ __forceinline__ void before_softmax(Scores& scores, const Index& index, const Problem<Config>& own) const {
    constexpr int registers = KvTile::volume / 2;
    static_assert(cute::size(Scores{}) == registers, "a thread has half as many scores as the tile has columns");
    const int tile = cute::get<1>(index(cute::_0{})) / KvTile::volume;
    const KvTileFacts facts = KvTileFacts::load(own.kv_facts + gpu::kv_facts_bytes * ((own.first + tile) % slots));
    if (facts.kind == TileKind::interior) return;
    own.windows.seen(*own.params, own.mask_table, facts).apply(*reinterpret_cast<float (*)[registers]>(scores.data()));
  }
};

}  // namespace gnaforge::sm90_cutlass
