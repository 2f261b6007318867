// What a backward kernel needs to know of a query beside its channels. Device only.
#pragma once

#include "gnaforge/sm90/backward/params.h"

namespace gnaforge::sm90::backward {

struct RowStatistics {
  float shift;  ///< The log-sum-exp in powers of two: a probability is 2^(score * scale - shift).
  float delta;
};

/// Of the query at `position` of a slice. Where there is none, every probability is 2^-infinity, and the gradient of
/// every score 0 * (0 - 0): what copies read there is 0.
template <int Rank>
__device__ __forceinline__ RowStatistics load_statistics(const Params<Rank>& params, int slice, int batch, int head,
                                                         const int (&position)[Rank], bool exists) {
  std::int64_t of_lse = batch * params.lse_batch_stride + head * params.lse_head_stride;
  std::int64_t of_delta = batch * params.delta_batch_stride + head * params.delta_head_stride;
#pragma unroll
  for (int d = 0; d < Rank; ++d) {
    exists = exists && position[d] < params.queries(slice, d);
    of_lse += position[d] * params.lse_token_stride[d];
    of_delta += position[d] * params.delta_token_stride[d];
  }
  RowStatistics found{INFINITY, 0};
  if (exists) found = {params.log_sum_exp[slice][of_lse] * 1.44269504f, params.delta[slice][of_delta]};
  return found;
}

}  // namespace gnaforge::sm90::backward
