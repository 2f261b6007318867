// With one half of rows, the warpgroup that copies Q from shared to tensor memory. Device only.
#pragma once

#include "gnaforge/ptx/tcgen05.h"
#include "gnaforge/sm100/forward/facts.h"

namespace gnaforge::sm100 {

template <class Config>
struct CopyQ {
  using L = Layout<Config>;

  ptx::SharedAddress shared;
  ptx::TensorAddress lanes;  ///< Of the warp.

  __device__ __forceinline__ void run() const {
    const int row = threadIdx.x % half_rows;
    const ptx::TensorAddress to = L::q_tensor + lanes;
    QTiles<Config> tiles{shared};
    for (std::uint32_t parity = 0; QTiles<Config>::Facts::load(tiles.next()).count != 0; parity ^= 1) {
      ptx::mbarrier_wait(shared + L::q_full, parity);
      ptx::mbarrier_wait(shared + L::q_used, parity ^ 1);
      ptx::fence_tensor_after();
#pragma unroll
      for (int c = 0; c < L::q_columns; c += 16) {  // 32 channels, 4 pieces of 16 bytes in their swizzled places
        std::uint32_t q[16];
        const ptx::SharedAddress from = shared + L::q_offset + c / 32 * L::q_chunk_bytes + row * row_bytes;
#pragma unroll
        for (int piece = 0; piece < 4; ++piece) {
          const int4 four = ptx::load_shared(from + ((c % 32 / 4 + piece ^ row % 8) << 4));
          q[4 * piece] = four.x, q[4 * piece + 1] = four.y, q[4 * piece + 2] = four.z, q[4 * piece + 3] = four.w;
        }
        if (L::q_columns - c >= 16)
          ptx::store_tensor_16(to + c, q);
        else
          ptx::store_tensor_8(to + c, q);
      }
      ptx::wait_tensor_stores();
      ptx::fence_tensor_before();
      __syncwarp();
      release(shared + L::q_empty);
      release(shared + L::q_copied);
    }
  }
};

}  // namespace gnaforge::sm100
