// What stored numbers of a call's inputs are multiplied by, if its dtype is too narrow to go without. Host and device.
#pragma once

#include <cstdint>

#include "gnaforge/gna/divisor.h"
#include "gnaforge/names.h"
#include "gnaforge/ptx/registers.h"

namespace gnaforge::gpu {

/// Of Q, K and V.
struct Descales {
  enum { q, k, v };

  const float* data[3];  ///< [batch, heads], on the device; null: 1.
  std::int64_t batch_stride[3], head_stride[3];

  static Descales of(const gnaforge_args& args) {
    Descales found{};
    for (int i = 0; i < 3; ++i) {
      const gnaforge_tensor* const tensor = tensor_of(args, GNAFORGE_DESCALE_Q + i);
      if (tensor == nullptr) continue;
      found.data[i] = static_cast<const float*>(tensor->data);
      found.batch_stride[i] = tensor->batch_stride;
      found.head_stride[i] = tensor->head_stride;
    }
    return found;
  }

#if defined(__CUDACC__)
  __device__ __forceinline__ float at(int tensor, std::int64_t batch, int head) const {
    const float* const from = data[tensor];
    if (from == nullptr) return 1.0f;
    const std::int64_t offset = batch * batch_stride[tensor] + head * head_stride[tensor];
    return __int_as_float(ptx::load_word(reinterpret_cast<const int*>(from + offset)));
  }
#endif
};

#if defined(__CUDACC__)
/// Those of a row of a Q tile of `Heads` heads, of which it is of number `member`: `scores` of Q K^T, `values` of P V.
/// `Facts` are those of the Q tile.
template <int Heads>
struct RowDescales {
  float scores, values;

  template <class Params, class Facts>
  __device__ __forceinline__ RowDescales(const Params& params, const Facts& work, int member) {
    const auto& call = params.call(work.slice);
    const std::int64_t batch = std::int64_t{params.first_batch(work.slice)} + work.batch;
    const int first = work.head - params.slices[work.slice].first_head;  // among the call's own
    const int kv_head = call.heads_per_kv_head.quotient(first / Heads);
    scores = call.at(Descales::q, batch, first + member) * call.at(Descales::k, batch, kv_head);
    values = call.at(Descales::v, batch, kv_head);
  }
};
#endif

}  // namespace gnaforge::gpu
