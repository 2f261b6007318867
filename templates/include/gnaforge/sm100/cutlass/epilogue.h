// How results leave: the output as boxes that clip at the tensor's borders, the log-sum-exp row by row. Device only.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/pipeline/pipeline.hpp>

#include "gnaforge/gpu/copy.h"
#include "gnaforge/gpu/log_sum_exp.h"
#include "gnaforge/sm100/cutlass/mask.h"

namespace gnaforge::sm100_cutlass {

/// What stands for an element of the log-sum-exp: an address, or none for a row that isn't a token.
struct LogSumExpElement {
  float* address;

  __device__ __forceinline__ float operator=(float value) const {
    if (address != nullptr) *address = value;
    return value;
  }
};

/// To the mainloop, a pointer to the log-sum-exps of the rows of all Q tiles; it finds their places in the tensor.
template <class Config>
struct LogSumExp {
  static constexpr int rank = Config::QTile::rank;
  using value_type = float;
  using element_type = float;
  using reference = LogSumExpElement;

  const gpu::Params<rank>* params;
  int row;

  __device__ __forceinline__ bool operator!=(decltype(nullptr)) const { return params->log_sum_exp[0] != nullptr; }
  __device__ __forceinline__ LogSumExp operator+(int rows) const { return {params, row + rows}; }
  __device__ __forceinline__ LogSumExpElement operator[](int rows) const { return *(*this + rows); }

  __device__ __forceinline__ LogSumExpElement operator*() const {
    // Worked out anew: what the trip count shares with it would be spilled over the loop between them.
    int own = row;
    asm volatile("" : "+r"(own));
    const gpu::Work<TileSource<Config>> work(*params, own / (halves * half_rows));
    return {gpu::log_sum_exp_of<HalfTile<typename Config::QTile>>(*params, work, own / half_rows % halves,
                                                                  own % half_rows)};
  }
};

/// As the kernel of example 77 wants it.
template <class Config, class Element>
struct Epilogue {
  using L = Layout<Config>;
  static constexpr int rank = L::rank;
  using Pipeline = cutlass::PipelineAsync<2>;
  using ElementOut = Element;
  using StrideLSE =
      cute::tuple<cute::_1, cute::tuple<cute::tuple<cute::_0, cute::_0>, cute::_0>>;  // rows, (heads, batch)
  static const int NumWarpsEpilogue = 1;
  static const int NumWarpsLoad = 1;

  /// [half][chunk][row][channel of the chunk], swizzled.
  using OutLayout =
      decltype(cute::tile_to_shape(cute::UMMA::Layout_K_SW128_Atom<Element>{},
                                   cute::Shape<cute::Int<half_rows>, cute::Int<L::channels>, cute::Int<halves>>{},
                                   cute::Step<cute::_1, cute::_2, cute::_3>{}));

  struct TensorStorage {
    using SmemLayoutO = OutLayout;
    cute::array_aligned<Element, cute::cosize_v<OutLayout>> smem_o;
  };

  struct Params {
    const gpu::Params<rank>* kernel;
    LogSumExp<Config> ptr_LSE;
    StrideLSE dLSE;
  };
  using Arguments = Params;

  const Params& params;

  __device__ __forceinline__ explicit Epilogue(const Params& own) : params(own) {}

  static __device__ __forceinline__ void prefetch_tma_descriptors(const Params& params) {
    ptx::prefetch_map(&params.kernel->maps[0].out);
  }

  template <class Block, class Shape, class ParamsShape>
  __device__ __forceinline__ void store(const Block& block, const Shape&, const Params& own, const ParamsShape&,
                                        TensorStorage& storage, Pipeline& pipeline,
                                        typename Pipeline::PipelineState& state) {
    const gpu::Params<rank>& kernel = *own.kernel;
    const gpu::Work<TileSource<Config>> work(kernel, cute::get<0>(block));
    const ptx::SharedAddress memory = ptx::shared_address(storage.smem_o.data());
    const bool leader = cute::elect_one_sync();
    typename Pipeline::PipelineState stored = state;
#pragma unroll
    for (int half = 0; half < halves; ++half) {
      pipeline.consumer_wait(state);
      ++state;
      if (L::Half::common > 0 && half > 0) ptx::bulk_wait();  // two stores to the tokens that both halves hold
      if (leader) {
        int token[rank];
#pragma unroll
        for (int d = 0; d < rank; ++d) token[d] = work.q_begin[d] + L::Half::begin(half, d);
        gpu::store_box<L, L::v_chunks>(kernel.maps[work.slice].out, kernel.folded, memory + half * L::half_bytes,
                                       half_rows * row_bytes, L::value_head_dim, work.head, token, work.batch);
      }
      ptx::bulk_commit();
    }
    ptx::bulk_wait_read();
#pragma unroll
    for (int half = 0; half < halves; ++half) {
      pipeline.consumer_release(stored);
      ++stored;
    }
  }
};

}  // namespace gnaforge::sm100_cutlass
