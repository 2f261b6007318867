// Where the log-sum-exp of a row goes. Device only.
#pragma once

#include <cstdint>

#include "gnaforge/gpu/params.h"

namespace gnaforge::gpu {

/// The place of row `row` of half `half`; null for a row that is no token, or that the first half has as well. `work`
/// says which Q tile it is (Work, or QTileFacts), and `Half` how it is cut (HalfTile).
template <class Half, class QTileOf>
__device__ __forceinline__ float* log_sum_exp_of(const Params<Half::rank>& params, const QTileOf& work, int half,
                                                 int row) {
  bool exists = row < Half::volume;
  std::int64_t offset = work.batch * params.lse_batch_stride + work.head * params.lse_head_stride;
#pragma unroll
  for (int d = 0; d < Half::rank; ++d) {
    const int token = row / Half::pitch(d) % Half::extent(d);
    if (Half::common > 0 && d == Half::axis) exists = exists && (half == 0 || token >= Half::common);
    const int position = work.q_begin[d] + Half::begin(half, d) + token;
    exists = exists && position < params.queries(work.slice, d);
    offset += position * params.lse_token_stride[d];
  }
  return exists ? params.log_sum_exp[work.slice] + offset : nullptr;
}

}  // namespace gnaforge::gpu
