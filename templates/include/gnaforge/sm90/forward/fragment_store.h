// From the layout of wgmma's accumulator to rows in shared memory. Device only.
#pragma once

#include "gnaforge/gpu/shared_memory.h"
#include "gnaforge/ptx/shared.h"
#include "gnaforge/sm90/forward/softmax.h"

namespace gnaforge::sm90 {

/// Multiplies both rows of an accumulator's threads by their factors, rounds, and writes them to a tile that lies in
/// chunks of channels from `region` on; `first_row` is the warp's. See shared_memory.h.
template <class Element, int N>
__device__ __forceinline__ void store_fragment(ptx::SharedAddress region, int chunk_bytes, int first_row,
                                               const float (&values)[N], const float (&factor)[2]) {
  const int lane = threadIdx.x % 32;
  const int row = first_row + lane % 16;
  const ptx::SharedAddress line = region + row * gpu::row_bytes;
#pragma unroll
  for (int c = 0; c < ceil_div(N, 8); ++c) {  // 16 channels each, or the last 8
    const int groups = min_int(2, N / 4 - 2 * c);
    std::uint32_t parts[4];
#pragma unroll
    for (int g = 0; g < groups; ++g)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        parts[2 * g + r] =
            Element::pack(values[element(2 * c + g, r, 0)] * factor[r], values[element(2 * c + g, r, 1)] * factor[r]);
    const int piece = c % 4 * 2 + lane / 16;  // of 16 bytes
    if (groups == 2)
      ptx::store_matrices(line + c / 4 * chunk_bytes + ((piece ^ (row % 8)) << 4), parts[0], parts[1], parts[2],
                          parts[3]);
    else  // addresses come from lanes 0 to 15
      ptx::store_matrices(line + c / 4 * chunk_bytes + (((c % 4 * 2) ^ (row % 8)) << 4), parts[0], parts[1]);
  }
}

}  // namespace gnaforge::sm90
