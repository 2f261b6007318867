// From the layout of wgmma's accumulator to rows in shared memory, and back. Device only.
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

/// Multiplies an accumulator by `factor`, and adds what such a tile holds, of which only the first `Rows` rows exist:
/// nobody stores what others get. The last row is read in their place, by its own warp alone: it will write there.
template <class Element, int Rows, int N>
__device__ __forceinline__ void add_fragment(ptx::SharedAddress region, int chunk_bytes, int first_row,
                                             float (&values)[N], float factor) {
  const int lane = threadIdx.x % 32;
  int row = first_row + lane % 16;
  if constexpr (Rows % warpgroup_rows != 0) {
    if (first_row >= Rows) return;
    row = min_int(row, Rows - 1);
  }
  const ptx::SharedAddress line = region + row * gpu::row_bytes;
  const auto add = [&](int group, int r, std::uint32_t part) {
    const float2 held = Element::unpack(part);
    float& a = values[element(group, r, 0)];
    float& b = values[element(group, r, 1)];
    a = fmaf(a, factor, held.x);
    b = fmaf(b, factor, held.y);
  };
#pragma unroll
  for (int c = 0; c < N / 8; ++c) {  // 16 channels each
    std::uint32_t parts[4];
    const int piece = c % 4 * 2 + lane / 16;
    ptx::load_matrices(parts, line + c / 4 * chunk_bytes + ((piece ^ (row % 8)) << 4));
#pragma unroll
    for (int i = 0; i < 4; ++i) add(2 * c + i / 2, i % 2, parts[i]);
  }
  if constexpr (N % 8 != 0) {
    constexpr int c = N / 8;
    std::uint32_t parts[2];
    ptx::load_matrices(parts, line + c / 4 * chunk_bytes + (((c % 4 * 2) ^ (row % 8)) << 4));
    add(2 * c, 0, parts[0]);
    add(2 * c, 1, parts[1]);
  }
}

}  // namespace gnaforge::sm90
