// The warpgroup that stores output and log-sum-exp, straight from registers: a thread has one row. Device only.
#pragma once

#include "gnaforge/ptx/hold.h"
#include "gnaforge/ptx/tcgen05.h"
#include "gnaforge/sm100/forward/facts.h"
#include "gnaforge/sm100/forward/row_softmax.h"

namespace gnaforge::sm100 {

__device__ __forceinline__ void store_global(void* to, const std::uint32_t (&from)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(from[0]), "r"(from[1]), "r"(from[2]),
               "r"(from[3])
               : "memory");
}

template <class Config>
struct Epilogue {
  using L = Layout<Config>;
  using Row = RowSoftmax<typename L::Factors>;
  static constexpr int rank = L::rank;

  const Params<Config>& params;
  ptx::SharedAddress shared;
  ptx::TensorAddress lanes;  ///< Of the warp.

  /// Where the row's results go.
  struct Place {
    bool exists;  ///< Whether the row is a token that this half stores: of those that both have, the first does.
    std::uint16_t* out;
    float* log_sum_exp;  ///< Null if the caller wants none.
  };

  __device__ __forceinline__ Place place(const gpu::QTileFacts<rank>& work, int half) const {
    const auto& call = params.call(work.slice);
    const auto& slice = params.slices[work.slice];
    const int row = threadIdx.x % half_rows;
    bool exists = row < L::half_queries;
    const int head = work.head + L::head(row);
    std::int64_t out = work.batch * call.out_batch_stride + head * call.out_head_stride;
    std::int64_t lse = work.batch * call.lse_batch_stride + head * call.lse_head_stride;
#pragma unroll
    for (int d = 0; d < rank; ++d) {
      const int token = L::token(row, d);
      if (L::Half::common > 0 && d == L::Half::axis) exists = exists && (half == 0 || token >= L::Half::common);
      const int position = work.q_begin[d] + L::Half::begin(half, d) + token;
      exists = exists && position < params.queries(work.slice, d);
      out += position * call.out_token_stride[d];
      lse += position * call.lse_token_stride[d];
    }
    return {exists, static_cast<std::uint16_t*>(slice.out) + out,
            slice.log_sum_exp == nullptr ? nullptr : slice.log_sum_exp + lse};
  }

  /// `parity` says how manieth Q tile of the thread block it is, `phase` of every other one.
  __device__ __forceinline__ void store(const gpu::QTileFacts<rank>& work, int half, std::uint32_t parity,
                                        std::uint32_t phase) const {
    const Place to = place(work, half);
    const int index = parity * 2 + half;
    ptx::mbarrier_wait(shared + L::statistics_full + 8 * index, phase);
    unsigned words[2];
    ptx::load_shared_words(
        words, shared + L::statistics + (index * half_rows + threadIdx.x % half_rows) * L::statistics_bytes);
    const float shift = __uint_as_float(words[0]), sum = __uint_as_float(words[1]);
    if (to.exists && to.log_sum_exp != nullptr) *to.log_sum_exp = Row::log_sum_exp(shift, sum);
    float inverse = 1 / sum;
    if constexpr (L::Factors::scaled)
      inverse = Row::true_sum(inverse) * gpu::RowDescales<L::heads>(params, work, 0).values;  // of P V, as of sums
    ptx::mbarrier_wait(shared + L::out_full + 8 * half, parity);
    ptx::fence_tensor_after();
    const ptx::TensorAddress from = L::out(half) + lanes;
#pragma unroll
    for (int c = 0; c < L::out_channels; c += 32) {
      float out[32];
      if (L::out_channels - c >= 32)
        ptx::load_tensor_32(from + c, out);
      else
        ptx::load_tensor_16(from + c, out);
      ptx::wait_tensor_loads();
      ptx::hold(out);
      if (c + 32 >= L::out_channels) {
        ptx::fence_tensor_before();
        __syncwarp();
        release(shared + L::out_empty + 8 * half);
      }
      if (!to.exists) continue;
#pragma unroll
      for (int piece = 0; piece < min_int(32, L::value_head_dim - c); piece += 8) {
        std::uint32_t bits[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          bits[i] = L::OutElement::pack(out[piece + 2 * i] * inverse, out[piece + 2 * i + 1] * inverse);
        store_global(to.out + c + piece, bits);
      }
    }
  }

  __device__ __forceinline__ void run() const {
    QTiles<Config> tiles{shared};
    for (std::uint32_t number = 0;; ++number) {
      const gpu::QTileFacts<rank> work = gpu::QTileFacts<rank>::load(tiles.next());
      if (work.count == 0) return;
#pragma unroll 1
      for (int half = 0; half < L::halves; ++half) store(work, half, number % 2, number / 2 % 2);
    }
  }
};

}  // namespace gnaforge::sm100
