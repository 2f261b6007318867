// How CUTLASS's mainloop gets Q, K and V with our mask: boxes of tokens straight from heads-last tensors, KV tiles in
// the order of the tile source. Device only. To be included before the mainloop, which finds the specialisation here.
#pragma once

#include <collective/fmha_fusion.hpp>
#include <collective/sm100_fmha_load_tma_warpspecialized.hpp>

#include "gnaforge/gpu/copy.h"
#include "gnaforge/gpu/cutlass.h"
#include "gnaforge/ptx/mbarrier.h"
#include "gnaforge/sm100/cutlass/mask.h"

namespace gnaforge::sm100_cutlass {

/// The mainloop's pipelines wait for a whole tile, of which the box may lack rows.
template <class L>
__device__ __forceinline__ void load_box(const CUtensorMap& map, bool folded, ptx::SharedAddress barrier,
                                         ptx::SharedAddress to, int chunk_bytes, int box_bytes, int head_dim, int head,
                                         const int (&token)[L::rank], int batch) {
  gpu::load_box<L, L::chunks>(map, folded, barrier, to, chunk_bytes, head_dim, head, token, batch);
  if (box_bytes < chunk_bytes) ptx::mbarrier_complete(barrier, L::chunks * (chunk_bytes - box_bytes));
}

}  // namespace gnaforge::sm100_cutlass

namespace cutlass::fmha::collective {

template <class Element, class StrideQ, class StrideK, class StrideV, class MmaQK, class MmaPV, class LayoutQ,
          class LayoutK, class LayoutV, class TensorStorage, class PipelineQ, class PipelineKV, class Config,
          class TileShape>
struct Sm100FmhaLoadTmaWarpspecialized<Element, StrideQ, StrideK, StrideV, MmaQK, MmaPV, LayoutQ, LayoutK, LayoutV,
                                       TensorStorage, PipelineQ, PipelineKV, gnaforge::sm100_cutlass::Mask<Config>,
                                       TileShape> {
  using L = gnaforge::sm100_cutlass::Layout<Config>;
  using Mask = gnaforge::sm100_cutlass::Mask<Config>;
  using Half = typename L::Half;
  using Source = gnaforge::sm100_cutlass::TileSource<Config>;
  using KvTile = typename Config::KvTile;
  static constexpr int rank = L::rank;
  static constexpr int half_rows = gnaforge::sm100_cutlass::half_rows, columns = gnaforge::sm100_cutlass::columns;
  static constexpr int row_bytes = gnaforge::sm100_cutlass::row_bytes, row = L::chunk_channels;

  // Where the boxes go: [stage][chunk][row][channel of the chunk], swizzled. Counted in elements.
  template <class Layout, class... Coordinates>
  static constexpr int at(Coordinates... coordinates) {
    return Layout{}(coordinates...);
  }
  static constexpr int kv_chunk = columns * row, q_chunk = half_rows * row, last = L::chunks - 1;
  static_assert(at<LayoutQ>(make_coord(_1{}, _0{}), _0{}, _0{}, _0{}) == row, "Q");
  static_assert(at<LayoutQ>(make_coord(_0{}, _0{}), _0{}, Int<4 * last>{}, _0{}) == last * q_chunk, "Q");
  static_assert(at<LayoutQ>(make_coord(_0{}, _0{}), _0{}, _0{}, _1{}) == L::chunks * q_chunk, "Q");
  static_assert(at<LayoutK>(make_coord(_1{}, _0{}), _0{}, _0{}, _0{}) == row, "K");
  static_assert(at<LayoutK>(make_coord(_0{}, _0{}), _0{}, Int<4 * last>{}, _0{}) == last * kv_chunk, "K");
  static_assert(at<LayoutK>(make_coord(_0{}, _0{}), _0{}, _0{}, _1{}) == L::chunks * kv_chunk, "K");
  static_assert(at<LayoutV>(make_coord(_0{}, _1{}), _0{}, _0{}, _0{}) == row, "V");
  static_assert(at<LayoutV>(make_coord(Int<64 * last>{}, _0{}), _0{}, _0{}, _0{}) == last * kv_chunk, "V");
  static_assert(at<LayoutV>(make_coord(_0{}, _0{}), _0{}, _1{}, _0{}) == 16 * row, "V");
  static_assert(at<LayoutV>(make_coord(_0{}, _0{}), _0{}, _0{}, _1{}) == L::chunks * kv_chunk, "V");

  struct Params {
    const gnaforge::gpu::Params<rank>* kernel;
  };
  using Arguments = Params;

  static __device__ __forceinline__ void prefetch_tma_descriptors(const Params& params) {
    gnaforge::ptx::prefetch_map(&params.kernel->maps[0].q);
    gnaforge::ptx::prefetch_map(&params.kernel->maps[0].k);
    gnaforge::ptx::prefetch_map(&params.kernel->maps[0].v);
  }

  template <class Block, class Shape, class ParamsShape>
  __device__ __forceinline__ void load(const Block& block, const Shape&, const Params& own, const ParamsShape&,
                                       TensorStorage& storage, PipelineQ& q_pipeline,
                                       typename PipelineQ::PipelineState& q_state, PipelineKV& kv_pipeline,
                                       typename PipelineKV::PipelineState& kv_state) {
    const gnaforge::gpu::Params<rank>& params = *own.kernel;
    const gnaforge::gpu::Work<Source> work(params, get<0>(block));
    const gnaforge::gpu::Maps& maps = params.maps[work.slice];
    const bool leader = elect_one_sync();
    const gnaforge::ptx::SharedAddress q_memory = gnaforge::ptx::shared_address(storage.smem_q.data());
    const gnaforge::ptx::SharedAddress kv_memory = gnaforge::ptx::shared_address(storage.smem_k.data());

    const auto load_q = [&](int half) {
      q_pipeline.producer_acquire(q_state);
      if (leader) {
        int token[rank];
        CUTLASS_PRAGMA_UNROLL
        for (int d = 0; d < rank; ++d) token[d] = work.q_begin[d] + Half::begin(half, d);
        gnaforge::sm100_cutlass::load_box<L>(maps.q, params.folded,
                                             gnaforge::ptx::shared_address(q_pipeline.producer_get_barrier(q_state)),
                                             q_memory + q_state.index() * L::half_bytes, half_rows * row_bytes,
                                             Half::volume * row_bytes, L::head_dim, work.head, token, work.batch);
      }
      ++q_state;
    };
    const auto load_kv = [&](const CUtensorMap& map, int head_dim, const int (&token)[rank]) {
      kv_pipeline.producer_acquire(kv_state);
      if (leader)
        gnaforge::sm100_cutlass::load_box<L>(map, params.folded,
                                             gnaforge::ptx::shared_address(kv_pipeline.producer_get_barrier(kv_state)),
                                             kv_memory + kv_state.index() * L::stage_bytes, columns * row_bytes,
                                             KvTile::volume * row_bytes, head_dim, work.kv_head, token, work.batch);
      ++kv_state;
    };

    typename Source::Walk walk;
    walk.begin(work.list);
    load_q(0);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int index = 0;;) {
      int origin[rank];
      CUTLASS_PRAGMA_UNROLL
      for (int d = 0; d < rank; ++d) origin[d] = Source::origin(work.list, walk, d);
      if (leader) gnaforge::gpu::count_tile(index >= Mask::unmasked(work.list));
      load_kv(maps.k, L::head_dim, origin);
      if (index == 0) load_q(1);
      load_kv(maps.v, L::value_head_dim, origin);
      if (++index == work.list.count) break;
      walk.step(work.list, index);
    }
  }
};

}  // namespace cutlass::fmha::collective
