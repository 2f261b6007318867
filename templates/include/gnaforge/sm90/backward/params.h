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

/// How backward_kv works on extra keys. All queries see a tile of them, so there are few, which take long: each is cut
/// into `parts`, of so many Q tiles each, whose sums another kernel adds up; see sums.h.
struct ExtraWork {
  float* sums;           ///< [batch, K/V head, part, tile, key, channels of K and of V].
  Divisor tiles, parts;  ///< Tiles of both pieces,
  int second;            ///< of which this is the second one's first.
  int steps;             ///< Q tiles of a part, those of all query heads one after the other.
};

/// One launch. Its tiles are Q tiles of backward_q, KV tiles of backward_kv.
template <int Rank>
struct Params : gpu::LaunchParams<Rank, Maps, max_slices> {
  static constexpr bool takes_extra_keys = true;

  const float* delta[max_slices];  ///< As log_sum_exp: of the slice's first query.
  std::int64_t delta_batch_stride, delta_head_stride, delta_token_stride[Rank];
  int keys[max_slices][Rank];          ///< Rows that a slice has of the key tensor.
  Divisor kv_tiles[max_slices][Rank];  ///< And KV tiles.
  ExtraKeys extra_keys;
  ExtraWork extra_work;
  int first_batches[max_slices];  ///< Of a slice's batch entries, among those of the call.
  int extra_tiles[max_slices];    ///< Of a slice's tiles those of extra keys, which are the first; of backward_kv.
  int accumulates;                ///< Bit i: `grad[i]` of Maps is added to what is there.

  GNAFORGE_HD const ExtraKeys& extra(int) const { return extra_keys; }
  GNAFORGE_HD const ExtraMaps& extra_maps(int) const {
    return *reinterpret_cast<const ExtraMaps*>(&this->maps[max_slices - 1]);
  }
  GNAFORGE_HD int first_batch(int slice) const { return first_batches[slice]; }
};
static_assert(sizeof(Params<3>) <= gpu::max_param_bytes, "room for parameters");

/// What adds up the sums of parts.
struct SumParams {
  struct View {
    void* data;
    std::int64_t batch_stride, head_stride, token_stride;
  };
  ExtraKeys keys;
  ExtraWork work;
  View grad[GNAFORGE_MAX_EXTRA][2];  ///< Of K and of V.
  int accumulates;                   ///< Bits 2p and 2p + 1: those of piece p are added to what is there.
  int batch;
  Divisor kv_heads;
};

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
