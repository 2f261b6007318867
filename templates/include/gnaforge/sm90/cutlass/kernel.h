// The forward kernel of sm90's variant `cutlass`: kernel and mainloop of CUTLASS's example 88, which come with the
// package nvidia-cutlass and stay as they are, with our tiles, masks, loads and stores. Device only.
//
// Warpgroup 0 loads: its warp 1 K and V, warp 2 Q, 0 and 3 nothing. Warpgroups 1 and 2 compute a half of the Q tile
// each. A pipeline is a pair of mbarriers per stage; who arrives at one of them waits for the other.
//   pipeline  stages  full: arrivals, by whom              empty: arrivals, by whom     what it guards
//   outer     2       1 and the bytes of a half, warp 2    128, warpgroup of the half   halves of Q; with each, facts
//   inner     2 to 5  1 and the bytes of a tile, warp 1    256, both warpgroups         K and V in turn; with K, facts
// load_warp_barrier, one mbarrier with 64 arrivals a phase, of both warps that load: warp 2 has noted what a Q tile
// visits, a Q tile ahead; warp 1 waits. math_wg_order has an mbarrier for each half and each of two places, with 128
// arrivals of the other half's warpgroup: they take turns at a Q tile's first product and at its epilogue. In these,
// each warpgroup has a named barrier of its own. All threads meet at __syncthreads once.
#pragma once

#include <cutlass/cutlass.h>

#include "gnaforge/sm90/cutlass/epilogue.h"

#include <kernel/fmha_kernel_tma_warpspecialized.hpp>

namespace gnaforge::sm90_cutlass {

/// Q tiles of all heads and batch entries, dealt out to the thread blocks.
struct Scheduler {
  struct Params {
    int tiles;
  };
  int index, tiles;

  __device__ __forceinline__ Scheduler(const Params& params) : index(blockIdx.x), tiles(params.tiles) {}
  __device__ __forceinline__ bool is_valid() const { return index < tiles; }
  __device__ __forceinline__ auto get_block_coord() const { return cute::make_coord(index, cute::_0{}); }
  __device__ __forceinline__ Scheduler& operator++() {
    index += gridDim.x;
    return *this;
  }
};

template <class Config>
__device__ __forceinline__ void forward(const gpu::Params<Config::QTile::rank>& params) {
  using L = Layout<Config>;
  using Element = typename gpu::CutlassElement<Config::dtype>::type;
  using Kernel = cutlass::fmha::kernel::FmhaKernelTmaWarpSpecialized<
      Mainloop<Config, Element>, Epilogue<Config>, Scheduler,
      cutlass::fmha::kernel::Option<cutlass::fmha::kernel::Tag::kLoadsQSeparately, cute::true_type>>;
  static_assert(Kernel::MaxThreadsPerBlock == L::threads && Kernel::SharedStorageSize <= L::shared_bytes,
                "the host part launches what the kernel needs");
  extern __shared__ __align__(gpu::swizzle_bytes) unsigned char memory[];
  if constexpr (L::Half::volume < half_rows) {
    gpu::clear_rows<L::threads, half_rows>(memory, halves * L::chunks, L::Half::volume);  // Q comes first
    ptx::fence_shared_to_async();
  }
  if (L::rank > 1 && threadIdx.x / warpgroup_threads == 1) {
    auto& storage = *reinterpret_cast<typename Kernel::SharedStorage*>(memory);
    sm90::make_mask_table<typename Config::KvTile, 1>(ptx::shared_address(storage.tensors.mainloop.notes.mask_table));
  }
  const typename Kernel::Params given{{}, {&params}, {&params}, {params.tiles()}};
  Kernel()(given, reinterpret_cast<char*>(memory));
  ptx::bulk_wait();  // for the stores of those that store: the kernel has no hook at its end
}

}  // namespace gnaforge::sm90_cutlass
