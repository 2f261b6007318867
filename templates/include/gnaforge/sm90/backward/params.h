// What the host part of a backward kernel hands to it. Host and device.
#pragma once

#include "gnaforge/gpu/params.h"
#include "gnaforge/sm90/extra_keys.h"

namespace gnaforge::sm90::backward {

/// What one slice is read and written by: `grad` are the gradients of Q, or those of K and V.
struct Maps {
  CUtensorMap q, k, v, grad_out, grad[2];
};

static_assert(sizeof(ExtraMaps) <= sizeof(Maps), "the last slice's place has room for either");

constexpr int max_slices = 4;  ///< With extra keys one less, whose maps they are in the place of.

/// One launch. Its tiles are Q tiles of backward_q, KV tiles of backward_kv.
template <int Rank>
struct Params : gpu::LaunchParams<Rank, Maps, max_slices> {
  static constexpr bool takes_extra_keys = true;

  const float* delta[max_slices];  ///< As log_sum_exp: of the slice's first query.
  std::int64_t delta_batch_stride, delta_head_stride, delta_token_stride[Rank];
  int keys[max_slices][Rank];          ///< Rows that a slice has of the key tensor.
  Divisor kv_tiles[max_slices][Rank];  ///< And KV tiles.
  ExtraKeys extra_keys;
  int first_batches[max_slices];  ///< Of a slice's batch entries, among those of the call.

  GNAFORGE_HD const ExtraKeys& extra(int) const { return extra_keys; }
  GNAFORGE_HD const ExtraMaps& extra_maps(int) const {
    return *reinterpret_cast<const ExtraMaps*>(&this->maps[max_slices - 1]);
  }
  GNAFORGE_HD int first_batch(int slice) const { return first_batches[slice]; }
};
static_assert(sizeof(Params<3>) <= gpu::max_param_bytes, "room for parameters");

/// What computes delta: rows are queries of all heads, one after the other in each batch entry.
template <int Rank>
struct DeltaParams {
  struct View {
    void* data;
    std::int64_t batch_stride, head_stride, token_stride[Rank];
  };
  View out, grad_out;
  View grad_log_sum_exp;  ///< Its data is null where it is zero.
  View delta;
  Divisor heads, tokens[Rank];
  int batch, rows;  ///< Rows of one batch entry.
};

}  // namespace gnaforge::sm90::backward
