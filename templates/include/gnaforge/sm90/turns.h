// Turns of the warpgroups that compute at issuing products. Device only.
#pragma once

#include "gnaforge/ptx/barrier.h"
#include "gnaforge/sm90/forward/layout.h"

namespace gnaforge::sm90 {

/// While the tensor cores work on the products of the warpgroup whose turn it was, others compute with what came of
/// theirs: without turns all may wait for products at the same time. `FirstBarrier` is that of one named barrier per
/// warpgroup; there are none where one warpgroup computes alone.
template <int Warpgroups, int FirstBarrier>
struct Turns {
  int warpgroup;

  /// Before anything else: the first turn is warpgroup 0's.
  __device__ __forceinline__ void begin() const {
    if (Warpgroups > 1 && warpgroup == Warpgroups - 1) pass();
  }
  __device__ __forceinline__ void await() const {
    if constexpr (Warpgroups > 1) ptx::barrier_sync(FirstBarrier + warpgroup, 2 * warpgroup_threads);
  }
  /// To the next warpgroup.
  __device__ __forceinline__ void pass() const {
    if constexpr (Warpgroups > 1)
      ptx::barrier_arrive(FirstBarrier + (warpgroup + 1 == Warpgroups ? 0 : warpgroup + 1), 2 * warpgroup_threads);
  }
};

}  // namespace gnaforge::sm90
