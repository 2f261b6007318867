// The kernels of CUTLASS's example 77 for head dim 128, from NVIDIA's own headers, without their host programs. With
// GNAFORGE_FORWARD_DIM, the forward kernel alone, for that head dim.
#include "launch.h"

#include "collective/fmha_fusion.hpp"
#include "collective/sm100_fmha_fwd_epilogue_tma_warpspecialized.hpp"
#include "collective/sm100_fmha_fwd_mainloop_tma_warpspecialized.hpp"
#include "kernel/fmha_tile_scheduler.hpp"
#include "kernel/sm100_fmha_bwd_kernel_tma_warpspecialized.hpp"
#include "kernel/sm100_fmha_fwd_kernel_tma_warpspecialized.hpp"

#ifdef GNAFORGE_FORWARD_DIM
constexpr int dim = GNAFORGE_FORWARD_DIM;
#else
constexpr int dim = 128;
#endif

using namespace cute;
using namespace cutlass::fmha;

using Problem =
    cute::tuple<int, int, int,
                cute::tuple<cute::tuple<int, int>, int>>;  // Q, K, D, ((heads per key head, key heads), batch)
using BackwardProblem =
    cute::tuple<int, int, int, int, cute::tuple<cute::tuple<int, int>, int>>;   // Q, K, D, D of V, the same
using Queries = cute::tuple<int, _1, cute::tuple<cute::tuple<int, int>, int>>;  // token, channel, heads and batch
using Keys = cute::tuple<int, _1, cute::tuple<cute::tuple<_0, int>, int>>;
using Rows = cute::tuple<_1, cute::tuple<cute::tuple<int, int>, int>>;

using Mainloop = collective::Sm100FmhaFwdMainloopTmaWarpspecialized<Element, float, float, Shape<_256, _128, Int<dim>>,
                                                                    Queries, Keys, Keys, collective::ResidualMask>;
using Epilogue =
    collective::Sm100FmhaFwdEpilogueTmaWarpspecialized<Element, float, Mainloop::TileShapePV, Queries, Rows>;
using Forward =
    kernel::Sm100FmhaFwdKernelTmaWarpspecialized<Problem, Mainloop, Epilogue, kernel::IndividualTileScheduler>;
#ifndef GNAFORGE_FORWARD_DIM
using Backward =
    kernel::Sm100FmhaBwdKernelTmaWarpSpecialized<BackwardProblem, Element, float, Shape<_128, _128, _128, _128>,
                                                 collective::ResidualMaskForBackward>;

GNAFORGE_KERNEL(Backward);
#endif
GNAFORGE_KERNEL(Forward);

namespace {

Queries queries(const Sizes& size) {
  int share = size.heads / size.key_heads, row = size.heads * dim;
  return {row, _1{}, make_stride(make_stride(dim, share * dim), size.queries * row)};
}
Keys keys(const Sizes& size) {
  int row = size.key_heads * dim;
  return {row, _1{}, make_stride(make_stride(_0{}, dim), size.keys * row)};
}
Rows rows(const Sizes& size) {
  int share = size.heads / size.key_heads;
  return {_1{}, make_stride(make_stride(size.queries, share * size.queries), size.heads * size.queries)};
}
auto heads_and_batch(const Sizes& size) {
  return make_tuple(make_tuple(size.heads / size.key_heads, size.key_heads), size.batch);
}

}  // namespace

/// tensors: q, k, v, o, lse.
GNAFORGE_EXPORT void forward(const Sizes& size, void* const* tensors, Launch* launch) {
  auto at = [&](int i) { return static_cast<Element*>(tensors[i]); };
  Forward::Arguments arguments{{size.queries, size.keys, dim, heads_and_batch(size)},
                               {{at(0), queries(size), at(1), keys(size), at(2), keys(size)}},
                               {at(3), queries(size), static_cast<float*>(tensors[4]), rows(size)},
                               {}};
  describe<Forward>(Forward::to_underlying_arguments(arguments, nullptr), launch);
}

#ifndef GNAFORGE_FORWARD_DIM
/// tensors: q, k, v, dO, -log2(e) lse, -rowsum(o dO), dQ in fp32 as [batch][heads][queries][128], dK, dV.
GNAFORGE_EXPORT void backward(const Sizes& size, void* const* tensors, Launch* launch) {
  auto at = [&](int i) { return static_cast<Element*>(tensors[i]); };
  auto row = [&](int i) { return static_cast<float*>(tensors[i]); };
  int share = size.heads / size.key_heads, head = size.queries * 128;
  Queries sums{128, _1{}, make_stride(make_stride(head, share * head), size.heads * head)};
  Backward::Arguments arguments{{size.queries, size.keys, 128, 128, heads_and_batch(size)},
                                {at(0), queries(size), at(1), keys(size), at(2), keys(size), at(3), queries(size),
                                 row(4), rows(size), row(5), rows(size), row(6), sums, 0.08838834764831845f},
                                {at(7), keys(size), at(8), keys(size)},
                                {}};
  describe<Backward>(Backward::to_underlying_arguments(arguments, nullptr), launch);
}
#endif
