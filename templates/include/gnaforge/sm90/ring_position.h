// Where in a ring of stages a warp is. Device only.
#pragma once

#include <cstdint>

namespace gnaforge::sm90 {

/// A place in the ring of stages, and the parity of the barriers' phase there.
struct RingPosition {
  int stage;
  std::uint32_t parity;

  template <int Stages>
  __device__ __forceinline__ void advance() {
    if (++stage == Stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace gnaforge::sm90
