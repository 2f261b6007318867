// Online softmax of one row, which a thread has to itself. Device only.
//
// Shifts, sums and limits are those of sm90/forward/softmax.h: of a score s, in powers of two t = s * scale, the
// probability is 2^(t - shift); a shift moves only if a score exceeds it by more than 2^growth, so few tiles rescale
// (Zadouri et al., FlashAttention-4). Where the shift is large, t is rounded before the shift is taken off. A NaN among
// the scores, or an infinite one, makes the sum and all that follows a NaN.
#pragma once

#include <cstdint>

#include "gnaforge/gna/axis.h"
#include "gnaforge/ptx/math.h"
#include "gnaforge/ptx/pair.h"

namespace gnaforge::sm100 {

/// 2^x of two numbers up to 127, by FMAs: the unit that computes exponentials is what a softmax waits for. x = n + f, n
/// an integer and |f| <= 1/2; 2^f by a polynomial of degree 4 with relative error 2.8e-6 that is 1 at 0, so that a
/// probability of 1 is exact; n is added to the exponent. Numbers below -127 give 0. A NaN gives any number.
__device__ __forceinline__ void exp2_by_fma(ptx::Pair x, float& a, float& b) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer, in the low bits
  float x0, x1;
  ptx::split_pair(x, x0, x1);
  x = ptx::make_pair(fmaxf(x0, -127.0f), fmaxf(x1, -127.0f));
  const ptx::Pair n = ptx::add(x, ptx::make_pair(magic));
  const ptx::Pair f = ptx::add(x, ptx::multiply_add(n, ptx::make_pair(-1.0f), ptx::make_pair(magic)));
  ptx::Pair p = ptx::multiply_add(f, ptx::make_pair(0.009582855738699436f), ptx::make_pair(0.05590642988681793f));
  p = ptx::multiply_add(p, f, ptx::make_pair(0.24024099111557007f));
  p = ptx::multiply_add(p, f, ptx::make_pair(0.6931241750717163f));
  p = ptx::multiply_add(p, f, ptx::make_pair(1.0f));
  float n0, n1, p0, p1;
  ptx::split_pair(n, n0, n1);
  ptx::split_pair(p, p0, p1);
  a = __int_as_float((__float_as_int(n0) << 23) + __float_as_int(p0));
  b = __int_as_float((__float_as_int(n1) << 23) + __float_as_int(p1));
}

/// `Factors` are those of the inputs' dtype.
template <class Factors>
struct RowSoftmax {
  static constexpr float lowest = -3.402823466e+38f;  ///< The shift of a row that has seen no key: finite, see move.
  static constexpr float growth = Factors::growth;
  static constexpr float large = 4096.0f;  ///< From here on t is rounded before the shift is taken off.

  float shift = lowest;
  float limit = -INFINITY;  ///< Scores above it, not scaled, go through `move`: all of a row with a large shift.
  float sum = 0;

  /// The largest score; a NaN if one is.
  template <int N>
  static __device__ __forceinline__ float largest(const float (&scores)[N]) {
    constexpr int chains = 4;
    float top[chains] = {scores[0], scores[2], scores[4], scores[6]};
#pragma unroll
    for (int i = 0; i < N; i += 2) top[i / 2 % chains] = ptx::max_or_nan(top[i / 2 % chains], scores[i], scores[i + 1]);
    return ptx::max_or_nan(ptx::max_or_nan(top[0], top[1], top[2]), top[3], top[3]);
  }

  /// Whether a tile whose largest score is `top` has to go through `move`.
  __device__ __forceinline__ bool moves(float top) const { return !(top <= limit); }

  /// Moves the shift if the scores call for it. Takes a large shift off the scores itself. Leaves in `base` what is
  /// still to be taken off, and returns what earlier results are to be multiplied with. `scale` is in powers of two.
  template <int N>
  __device__ __forceinline__ float move(float top, float& base, float (&scores)[N], float scale) {
    const float wanted = __fmul_rn(top, scale), old = shift;
    if (!(wanted <= old + growth)) shift = wanted;  // never where no key is seen: lowest + growth is lowest
    const float factor = ptx::exp2_fast(old - shift);
    sum *= factor;
    const float inverse = __fdividef(1.0f, scale), size = fabsf(shift);
    if (size >= large && size < -lowest) {
      limit = -INFINITY;
      base = 0;
#pragma unroll
      for (int i = 0; i < N; ++i)  // exponentials multiply with the scale
        scores[i] = __fsub_rn(__fmul_rn(scores[i], scale), shift) * inverse;
    } else {
      limit = (shift + growth) * inverse;
      base = size <= -lowest ? shift : NAN;  // the others' exponentials by FMA would be no NaN
    }
    return factor;
  }

  /// Adds a tile's probabilities.
  template <int N>
  __device__ __forceinline__ void add(const float (&probabilities)[N]) {
    constexpr int chains = 4;
    ptx::Pair sums[chains] = {ptx::make_pair(sum, 0.0f)};
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const ptx::Pair own = ptx::make_pair(probabilities[2 * i], probabilities[2 * i + 1]);
      ptx::Pair& chain = sums[(i + 1) % chains];
      chain = i + 1 < chains ? own : ptx::add(chain, own);
    }
    float even, odd;
    ptx::split_pair(ptx::add(ptx::add(sums[0], sums[1]), ptx::add(sums[2], sums[3])), even, odd);
    sum = even + odd;
  }

  /// What is added to exponents to which `base` has yet to be taken off.
  static __device__ __forceinline__ float exponent(float base) {
    return Factors::p_exponent == 0 ? -base : Factors::p_exponent - base;
  }

  /// The sum of probabilities as they are, of `sum`.
  static __device__ __forceinline__ float true_sum(float sum) {
    return Factors::p_exponent == 0 ? sum : sum * (1.0f / (1 << Factors::p_exponent));
  }

  /// Relative to infinity, a score of infinity has no probability, and the sum is a NaN.
  static __device__ __forceinline__ float log_sum_exp(float shift, float sum) {
    return shift * 0.693147181f + (shift == INFINITY ? 0.0f : logf(sum));
  }
};

}  // namespace gnaforge::sm100
