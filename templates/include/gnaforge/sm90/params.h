// What the host part hands to the kernel. Host and device.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "gnaforge/problem.h"

namespace gnaforge::sm90 {

/// One launch: one dilation group. Maps hold base addresses and strides, so positions are within the group.
template <int Rank>
struct Params {
  CUtensorMap q, k, v, out;
  float* log_sum_exp;  ///< Of the group's first token; null if the caller wants none.
  std::int64_t lse_batch_stride, lse_head_stride, lse_token_stride[Rank];
  Axis axis[Rank];
  int q_tiles[Rank];
  int tiles;  ///< Of all batch entries and heads.
  int kv_heads;
  int heads_per_kv_head;
  float scale;
  float scale_log2;  ///< For a softmax in powers of two.
  int folded;        ///< The maps' channels run through all heads, and their last dim is the batch; see maps.h.
};

}  // namespace gnaforge::sm90
