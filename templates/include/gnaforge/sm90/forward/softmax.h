// Online softmax of the two rows that a thread shares with three others. Device only.
#pragma once

#include "gnaforge/gna/axis.h"
#include "gnaforge/ptx/math.h"

namespace gnaforge::sm90 {

/// Of an accumulator of wgmma, a thread holds of each group of 8 columns two neighbours of row r (elements 0 and 1)
/// and two of row r + 8 (elements 2 and 3).
GNAFORGE_HD constexpr int element(int group, int row, int column) { return 4 * group + 2 * row + column; }

struct Softmax {
  float max[2];      ///< Of the scores so far, not scaled.
  float sum[2];      ///< Of this thread's columns.
  float rescale[2];  ///< What the last step multiplied earlier results with.

  __device__ __forceinline__ void begin() {
    for (int r = 0; r < 2; ++r) {
      max[r] = -INFINITY;
      sum[r] = 0;
      rescale[r] = 1;
    }
  }

  /// Turns scores into probabilities relative to the maximum so far; `scale` is in powers of two.
  template <int N>
  __device__ __forceinline__ void step(float (&scores)[N], float scale) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = max[r];
#pragma unroll
      for (int i = 0; i < N / 4; ++i) top = fmaxf(fmaxf(top, scores[element(i, r, 0)]), scores[element(i, r, 1)]);
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      // A row that has seen no key yet: infinity minus infinity must not occur.
      const float shift = top == -INFINITY ? 0.0f : top * scale;
      rescale[r] = ptx::exp2_fast(fmaf(max[r], scale, -shift));
      max[r] = top;
      float even = sum[r] * rescale[r], odd = 0;
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        float& a = scores[element(i, r, 0)];
        float& b = scores[element(i, r, 1)];
        a = ptx::exp2_fast(fmaf(a, scale, -shift));
        b = ptx::exp2_fast(fmaf(b, scale, -shift));
        even += a;
        odd += b;
      }
      sum[r] = even + odd;
    }
  }

  template <int N>
  __device__ __forceinline__ void apply(float (&out)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] *= rescale[i / 2 % 2];
  }

  /// Adds up the sums of the four threads of a row.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
      sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    }
  }
};

}  // namespace gnaforge::sm90
