// delta = sum over channels of out * grad_out, less the log-sum-exp's gradient: what the backward kernels need of a row
// beside its log-sum-exp. A kernel of its own, as fast as memory: each row is read once. Device only.
#pragma once

#include "gnaforge/gpu/element.h"
#include "gnaforge/sm90/backward/delta.h"
#include "gnaforge/sm90/backward/params.h"

namespace gnaforge::sm90::backward {

/// Where a row of a view begins.
template <int Rank>
__device__ __forceinline__ std::int64_t row_offset(const typename DeltaParams<Rank>::View& view, int batch, int head,
                                                   const int (&token)[Rank]) {
  std::int64_t offset = batch * view.batch_stride + head * view.head_stride;
#pragma unroll
  for (int d = 0; d < Rank; ++d) offset += token[d] * view.token_stride[d];
  return offset;
}

template <class Element>
__device__ __forceinline__ float dot(uint4 a, uint4 b) {
  const std::uint32_t left[] = {a.x, a.y, a.z, a.w}, right[] = {b.x, b.y, b.z, b.w};
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = Element::unpack(left[i]), y = Element::unpack(right[i]);
    sum = fmaf(x.x, y.x, sum);
    sum = fmaf(x.y, y.y, sum);
  }
  return sum;
}

/// `Channels` of the value head dim; blocks of delta_threads threads, any number of them along x and y.
template <class Element, int Rank, int Channels>
__device__ __forceinline__ void compute_delta(const DeltaParams<Rank>& params) {
  using Lanes = DeltaLanes<Channels>;
  const int piece = static_cast<int>(threadIdx.x) % Lanes::per_row;
  // All lanes of a warp meet at the shuffles, whether they have a row or not.
  for (int first = blockIdx.x * Lanes::rows_per_block; first < params.rows;
       first += gridDim.x * Lanes::rows_per_block) {
    const int row = first + static_cast<int>(threadIdx.x) / Lanes::per_row;
    const bool exists = row < params.rows;
    int rest = exists ? row : 0, token[Rank];
    const int head = params.heads.split(rest);
#pragma unroll
    for (int d = Rank - 1; d >= 0; --d) token[d] = params.tokens[d].split(rest);
    for (int batch = blockIdx.y; batch < params.batch; batch += gridDim.y) {
      float sum = 0;
      if (exists && piece < Lanes::pieces) {
        const auto load = [&](const typename DeltaParams<Rank>::View& view) {
          const std::int64_t offset = row_offset<Rank>(view, batch, head, token) * Element::bytes + 16 * piece;
          return *reinterpret_cast<const uint4*>(static_cast<const char*>(view.data) + offset);
        };
        sum = dot<Element>(load(params.out), load(params.grad_out));
      }
#pragma unroll
      for (int distance = Lanes::per_row / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
      if (!exists || piece != 0) continue;
      if (params.grad_log_sum_exp.data != nullptr)
        sum -= static_cast<const float*>(
            params.grad_log_sum_exp.data)[row_offset<Rank>(params.grad_log_sum_exp, batch, head, token)];
      static_cast<float*>(params.delta.data)[row_offset<Rank>(params.delta, batch, head, token)] = sum;
    }
  }
}

}  // namespace gnaforge::sm90::backward
