// Online softmax of the two rows that a thread shares with three others. Device only.
//
// Of a score s, in powers of two t = s * scale, the probability is 2^(t - shift). The shift is a maximum of t, rounded
// as a float: what was added up under one shift counts exp2(old - new) times under the next, exactly 1 where it stays,
// and the log-sum-exp is the shift plus that of the sum. So nothing depends on how the shift was rounded.
//
// A shift moves only if a score exceeds it by more than 2^`growth` (Zadouri et al., FlashAttention-4, on rescaling):
// few tiles do that, so threads compare scores with a limit and go through `move` only if a score of the warp is above.
//
// A fused t - shift is off by the rounding of the shift, for t = shift too: by up to 2^-13 for shifts below 2^12, too
// little to change the 16 bits of a probability of 1, but by 64 at 2^30. Where the shift is larger, t is rounded first,
// as the shift was, and the difference is exact: scores of any size have a largest probability of 1.
#pragma once

#include "gnaforge/gna/axis.h"
#include "gnaforge/ptx/math.h"

namespace gnaforge::sm90 {

/// Of an accumulator of wgmma, a thread holds of each group of 8 columns two neighbours of row r (elements 0 and 1)
/// and two of row r + 8 (elements 2 and 3).
GNAFORGE_HD constexpr int element(int group, int row, int column) { return 4 * group + 2 * row + column; }

struct Softmax {
  static constexpr float lowest = -3.402823466e+38f;  ///< The shift of a row that has seen no key: finite, see move.
  static constexpr float growth = 8.0f;
  static constexpr float large = 4096.0f;  ///< From here on t is rounded before the shift is taken off.

  float shift[2];
  float limit[2];  ///< Scores above it, not scaled, go through `move`: all of a row with a large shift.
  float sum[2];    ///< Of this thread's columns.

  __device__ __forceinline__ void begin() {
    for (int r = 0; r < 2; ++r) {
      shift[r] = lowest;
      limit[r] = -INFINITY;
      sum[r] = 0;
    }
  }

  /// Turns scores into probabilities relative to the shift; `scale` is in powers of two. Where shifts move,
  /// `rescale(factor)` multiplies the earlier results of both rows.
  template <int N, class Rescale>
  __device__ __forceinline__ void step(float (&scores)[N], float scale, const Rescale& rescale) {
    float top[2], base[2];  // base: what is taken off
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = fmaxf(scores[element(0, r, 0)], scores[element(0, r, 1)]);
#pragma unroll
      for (int i = 1; i < N / 4; ++i) top[r] = fmaxf(fmaxf(top[r], scores[element(i, r, 0)]), scores[element(i, r, 1)]);
      base[r] = shift[r];
    }
    if (__any_sync(~0u, top[0] > limit[0] || top[1] > limit[1])) {
      float factor[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) factor[r] = move(r, top[r], base[r], scores, scale);
      if (__any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f)) rescale(factor);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float even = sum[r], odd = 0;
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        float& a = scores[element(i, r, 0)];
        float& b = scores[element(i, r, 1)];
        a = ptx::exp2_fast(fmaf(a, scale, -base[r]));
        b = ptx::exp2_fast(fmaf(b, scale, -base[r]));
        even += a;
        odd += b;
      }
      sum[r] = even + odd;
    }
  }

  /// Adds up the sums of the four threads of a row.
  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
      sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    }
  }

 private:
  /// Moves the shift of row `r` if its scores, of which `top` is the thread's largest, call for it: by those of the row
  /// alone, whatever other rows of the warp do. Takes a large shift off the scores itself, and leaves a base of 0.
  /// Returns what earlier results are to be multiplied with.
  template <int N>
  __device__ __forceinline__ float move(int r, float top, float& base, float (&scores)[N], float scale) {
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    const float wanted = __fmul_rn(top, scale), old = shift[r];
    if (wanted > old + growth) shift[r] = wanted;  // never where no key is seen: lowest + growth is lowest
    const float factor = ptx::exp2_fast(old - shift[r]);
    sum[r] *= factor;
    const float inverse = __fdividef(1.0f, scale), size = fabsf(shift[r]);
    if (size >= large && size < -lowest) {
      limit[r] = -INFINITY;
      base = 0;
#pragma unroll
      for (int i = 0; i < N / 4; ++i)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& score = scores[element(i, r, c)];
          score = __fsub_rn(__fmul_rn(score, scale), shift[r]) * inverse;  // `step` multiplies with the scale
        }
    } else {
      limit[r] = (shift[r] + growth) * inverse;
      base = shift[r];
    }
    return factor;
  }
};

}  // namespace gnaforge::sm90
