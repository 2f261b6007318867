// The forward kernel of the variant `cutlass`: the mainloop of CUTLASS's example 77, which comes with the package
// nvidia-cutlass and stays as it is, with our mask, loads and stores. Device only.
//
// Warps 0 to 3 and 4 to 7 do the softmax of one half of the Q tile each, 8 to 11 the correction (they rescale outputs),
// 12 issues MMAs, 13 loads, 14 stores, 15 does nothing. A pipeline of the mainloop is a pair of mbarriers per stage;
// who arrives at one of them waits for the other.
//   pipeline          stages  full: arrivals, by whom          empty: arrivals, by whom   what it guards
//   load_q            2       1 and the bytes of a half, load  1, MMA (commit)            halves of Q
//   load_kv           3       1 and the bytes of a tile, load  1, MMA (commit)            K and V in turn
//   mma_s0, mma_s1    1       1, MMA (commit)                  128, softmax of the half   scores, then P in their place
//   s0_corr, s1_corr  1       128, softmax of the half         128, correction            maxima and sums of its rows
//   mma_corr          2       1, MMA (commit)                  128, correction            outputs in tensor memory
//   corr_epi          2       128, correction                  32, store                  rounded outputs
// order_s01 has an mbarrier for each half, with 128 arrivals of the other half's softmax: they take turns. All threads
// meet at __syncthreads once, when the pipelines are there and our padding is clear.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/kernel_hardware_info.h>

#include "gnaforge/sm100/cutlass/load.h"

#include <collective/sm100_fmha_fwd_mainloop_tma_warpspecialized.hpp>
#include <kernel/fmha_tile_scheduler.hpp>
#include <kernel/sm100_fmha_fwd_kernel_tma_warpspecialized.hpp>

#include "gnaforge/sm100/cutlass/epilogue.h"

namespace gnaforge::sm100_cutlass {

/// Example 77's roles of warps. The registers of the four kinds of warpgroups add up to 512 a thread; persistent
/// correction warps need more than there, and the softmax can spare them.
struct Schedule : cutlass::fmha::kernel::Sm100FmhaCtxKernelWarpspecializedSchedule {
  static const int NumRegsSoftmax = 184;
  static const int NumRegsCorrection = 112;
  static const int NumRegsOther = 32;
};

/// The types of example 77 for one config.
template <class Config>
struct Types {
  using L = Layout<Config>;
  using Element = typename gpu::CutlassElement<Config::dtype>::type;
  using Tile = cute::Shape<cute::Int<L::rows>, cute::Int<L::columns>, cute::Int<L::channels>>;
  using Heads = cute::tuple<cute::tuple<cute::_1, cute::_1>, cute::_1>;
  /// Rows of all Q tiles; keys, where 1 says that there are some: were it not static, the mainloop would compile a
  /// branch for none, with what is left in it of debugging; channels; heads and batch entries, which count as Q tiles.
  using Shape = cute::tuple<int, cute::_1, cute::Int<L::channels>, Heads, GnaShape<TileSource<Config>>>;
  /// Strides only say which dim is contiguous: copies are ours.
  using StrideQ = cute::tuple<int, cute::_1, cute::tuple<cute::tuple<int, int>, int>>;
  using StrideK = cute::tuple<int, cute::_1, cute::tuple<cute::tuple<cute::_0, int>, int>>;
  using Mainloop =
      cutlass::fmha::collective::Sm100FmhaFwdMainloopTmaWarpspecialized<Element, float, float, Tile, StrideQ, StrideK,
                                                                        StrideK, Mask<Config>>;
  using Scheduler = cutlass::fmha::kernel::PersistentTileScheduler;
  using Kernel = cutlass::fmha::kernel::Sm100FmhaFwdKernelTmaWarpspecialized<Shape, Mainloop, Epilogue<Config, Element>,
                                                                             Scheduler, Schedule>;
  static_assert(Kernel::MaxThreadsPerBlock == L::threads && Kernel::SharedStorageSize <= L::state_offset,
                "the host part launches what the kernel needs");
  static_assert(sizeof(MaskState<TileSource<Config>>) * L::softmax_warps <= L::state_bytes, "room for the states");
  static_assert(Mainloop::StageCountKV == kv_stages, "the ring of K and V");
  static_assert(static_cast<int>(Mainloop::TmemAllocation::kEnd) <= 512,
                "scores and outputs fit the 512 columns of tensor memory");
};

template <class Config>
__device__ __forceinline__ void forward(const gpu::Params<Config::QTile::rank>& params) {
  using T = Types<Config>;
  using L = Layout<Config>;
  extern __shared__ __align__(gpu::swizzle_bytes) unsigned char memory[];
  constexpr bool short_q = L::Half::volume < half_rows, short_kv = Config::KvTile::volume < columns;
  if constexpr (short_q)
    gpu::clear_rows<L::threads, half_rows>(memory + L::q_offset, halves * L::chunks, L::Half::volume);
  if constexpr (short_kv)
    gpu::clear_rows<L::threads, columns>(memory + L::kv_offset, kv_stages * L::chunks, Config::KvTile::volume);
  if constexpr (short_q || short_kv) ptx::fence_shared_to_async();

  auto* const states = reinterpret_cast<MaskState<TileSource<Config>>*>(memory + L::state_offset);
  const GnaShape<TileSource<Config>> gna_shape{&params, states + threadIdx.x / 32, false, {}};
  const typename T::Shape shape{params.tiles() * L::rows, {}, {}, {}, gna_shape};
  // One dim of blocks, all Q tiles of all heads and batch entries.
  const typename T::Scheduler::Params schedule{params.tiles(), {L::max_tiles + 1}, {1}, {1}, {}};
  const typename T::Kernel::Params kernel_params{
      shape, {{&params}, params.scale, params.scale_log2, 1.0f}, {&params, {&params, 0}, {}}, schedule};
  typename T::Kernel()(kernel_params, reinterpret_cast<char*>(memory));
}

}  // namespace gnaforge::sm100_cutlass
