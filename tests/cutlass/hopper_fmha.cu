// The kernels of CUTLASS's example 88 for head dim 128, from NVIDIA's own headers, without their host programs. With
// GNAFORGE_FORWARD_DIM, the forward kernel alone, for that head dim.
#include "launch.h"

#include "device/fmha_device_bwd.hpp"
#include "kernel/fmha_kernel_builder.hpp"

#ifdef GNAFORGE_FORWARD_DIM
constexpr int dim = GNAFORGE_FORWARD_DIM;
#else
constexpr int dim = 128;
#endif

using namespace cute;
using cutlass::fmha::collective::DefaultFusion;

using ForwardTile = Shape<_128, _128, Int<dim>>;
using Tokens = cute::tuple<int, _1, cute::tuple<int, int>>;  // token, channel, (batch, head)
using Forward =
    cutlass::fmha::kernel::FmhaBuilder<Element, float, float, ForwardTile, Tokens, Tokens, Tokens, DefaultFusion,
                                       cutlass::gemm::KernelTmaWarpSpecializedCooperative>::Kernel;
GNAFORGE_KERNEL(Forward);
#ifndef GNAFORGE_FORWARD_DIM
using Backward =
    cutlass::fmha::device::FmhaBwd<Element, float, Shape<_64, _128, _128>, DefaultFusion>::Operation::Kernel;
GNAFORGE_KERNEL(Backward);
#endif

/// tensors: q, k, v, o, lse.
GNAFORGE_EXPORT void forward(const Sizes& size, void* const* tensors, Launch* launch) {
  auto [b, h, hk, q, k] = size;
  auto tokens = [h = h](int n) { return Tokens{h * dim, _1{}, make_stride(n * h * dim, dim)}; };
  auto at = [&](int i) { return static_cast<Element*>(tensors[i]); };
  Forward::Arguments arguments{
      {b, h, q, k, dim},
      {at(0), tokens(q), at(1), tokens(k), at(2), tokens(k)},
      {at(3), tokens(q), static_cast<float*>(tensors[4]), make_stride(_1{}, make_stride(h * q, q))},
      {}};
  describe<Forward>(Forward::to_underlying_arguments(arguments, nullptr), launch);
}

#ifndef GNAFORGE_FORWARD_DIM
/// tensors: q, k, v, dO, lse, rowsum(o dO), dQ in fp32 as [batch][heads][queries][128], dK, dV.
GNAFORGE_EXPORT void backward(const Sizes& size, void* const* tensors, Launch* launch) {
  auto [b, h, hk, q, k] = size;
  auto tokens = [h = h](int n) { return make_stride(n * h * 128, 128, h * 128, _1{}); };
  auto at = [&](int i) { return static_cast<Element*>(tensors[i]); };
  auto rows = [&](int i) { return static_cast<float*>(tensors[i]); };
  Backward::Arguments arguments{
      {b, h, q, k, 128},
      {at(0), tokens(q), at(1), tokens(k), at(2), tokens(k), at(3), tokens(q), rows(4), make_stride(h * q, q, _1{}),
       rows(5), make_stride(h * q, q, _1{}), rows(6), make_stride(b == 1 ? 0 : h * q * 128, q * 128, 128, _1{})},
      {at(7), tokens(k), at(8), tokens(k)},
      {}};
  describe<Backward>(Backward::to_underlying_arguments(arguments, nullptr), launch);
}
#endif
