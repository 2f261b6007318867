// How results leave: the output as boxes that clip at the tensor's borders, the log-sum-exp row by row. Device only.
#pragma once

#include "gnaforge/gpu/log_sum_exp.h"
#include "gnaforge/ptx/barrier.h"
#include "gnaforge/sm90/cutlass/mainloop.h"

namespace gnaforge::sm90_cutlass {

/// A pipeline that example 88's kernel makes for epilogues that load; ours doesn't.
struct NoLoads {
  enum class ThreadCategory { None, Producer, Consumer };
  struct Params {
    ThreadCategory role;
    unsigned dst_blockid, producer_arv_count, consumer_arv_count, transaction_bytes;
  };
  struct SharedStorage {};
  __device__ __forceinline__ NoLoads(const SharedStorage&, const Params&) {}
};

/// As the kernel of example 88 wants it: called by both warpgroups in turn, with what `Mainloop::compute` returns.
template <class Config>
struct Epilogue {
  using L = Layout<Config>;
  using Half = typename L::Half;
  static constexpr int rank = L::rank;
  static constexpr int out_registers = L::channels / 2;
  static_assert(L::Element::bytes == 2, "registers and 8x8 matrices hold 16-bit elements");
  static constexpr int first_barrier = 1;  ///< One named barrier per warpgroup; CUTLASS takes none.

  using LoadPipeline = NoLoads;
  using PipelineStorage = NoLoads::SharedStorage;
  static constexpr int TmaTransactionBytes = 0;
  struct alignas(gpu::swizzle_bytes) TensorStorage {
    unsigned char out[L::half_bytes];
  };
  struct Params {
    const gpu::Params<rank>* kernel;
  };
  using Arguments = Params;

  template <class Tile, class Block, class Result, class Mma, class Shape>
  __device__ __forceinline__ void operator()(const Tile&, const Block&, const Result& result, const Mma&, const Shape&,
                                             const Params& given, const LoadPipeline&, TensorStorage& storage) const {
    const gpu::Params<rank>& params = *given.kernel;
    const auto out = cute::get<0>(result);
    const auto log_sum_exp = cute::get<1>(result);
    static_assert(cute::size(decltype(out){}) == out_registers && cute::size(decltype(log_sum_exp){}) == 2, "64 rows");
    const gpu::QTileFacts<rank> work = gpu::QTileFacts<rank>::load(cute::get<2>(result));
    const int thread = threadIdx.x % warpgroup_threads, lane = threadIdx.x % 32, first_row = thread / 32 * 16;
    const int half = threadIdx.x / warpgroup_threads - 1, barrier = first_barrier + half;

    if (params.log_sum_exp[work.slice] != nullptr && lane % 4 == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float* const to = gpu::log_sum_exp_of<Half>(params, work, half, first_row + lane / 4 + 8 * r);
        // The mainloop says infinity where a sum is 0, and so is the output, or NaN, and so is the output.
        const float found = log_sum_exp(r), value = found == INFINITY ? out(sm90::element(0, r, 0)) - INFINITY : found;
        if (to != nullptr) *to = value;
      }
    }
    if (thread == 0) ptx::bulk_wait_read();
    ptx::barrier_sync(barrier, warpgroup_threads);  // nobody reads any more what was stored last
    const ptx::SharedAddress memory = ptx::shared_address(storage.out);
    const int row = first_row + lane % 16;
#pragma unroll
    for (int c = 0; c < L::v_chunks * L::chunk_channels / 16; ++c) {  // 16 channels each
      std::uint32_t pieces[4];
#pragma unroll
      for (int g = 0; g < 2; ++g)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          pieces[2 * g + r] =
              L::Element::pack(out(sm90::element(2 * c + g, r, 0)), out(sm90::element(2 * c + g, r, 1)));
      const int piece = c % 4 * 2 + lane / 16;  // of 16 bytes
      ptx::store_matrices(memory + c / 4 * half_rows * row_bytes + row * row_bytes + ((piece ^ (row % 8)) << 4),
                          pieces[0], pieces[1], pieces[2], pieces[3]);
    }
    ptx::fence_shared_to_async();
    ptx::barrier_sync(barrier, warpgroup_threads);
    if (thread == 0) {
      int token[rank];
#pragma unroll
      for (int d = 0; d < rank; ++d) token[d] = work.q_begin[d] + Half::begin(half, d);
      gpu::store_box<L, L::v_chunks>(params.maps[work.slice].out, params.folded, memory, half_rows * row_bytes,
                                     L::value_head_dim, work.head, token, work.batch);
      ptx::bulk_commit();
      // Tokens that both halves hold: the other warpgroup stores them when it is its turn.
      if constexpr (Half::common > 0) ptx::bulk_wait();
    }
  }
};

}  // namespace gnaforge::sm90_cutlass
