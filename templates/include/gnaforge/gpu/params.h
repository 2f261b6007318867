// What the host part hands to the kernel. Host and device.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "gnaforge/gna/axis.h"

namespace gnaforge::gpu {

/// What one slice is read and written by: a dilation group of all batch entries or of one (see maps.h). Maps hold base
/// addresses and strides, so positions are within the group.
struct Maps {
  CUtensorMap q, k, v, out;
};

/// Slices of one launch. They are parameters, which a CUDA graph copies, and not in memory, where someone would have to
/// put them and to fence: as many as leave room for the rest in the 4 KB that every driver takes.
constexpr int max_slices = 7;

/// One launch.
template <int Rank>
struct Params {
  Maps maps[max_slices];
  float* log_sum_exp[max_slices];             ///< Of the slice's first token; null if the caller wants none.
  int length[max_slices][Rank];               ///< Tokens of the slice's dilation group.
  unsigned q_tiles_factor[max_slices][Rank];  ///< Of a Divisor: how many Q tiles the slice has along an axis.
  int q_tiles_shift[max_slices];              ///< Byte d is of axis d.
  int first_tile[max_slices + 1];             ///< Of each slice; from the last one's end on, how many there are.
  int slices;
  std::int64_t lse_batch_stride, lse_head_stride, lse_token_stride[Rank];
  Axis axis[Rank];  ///< Lengths are those of the slices.
  Divisor kv_heads;
  Divisor heads_per_kv_head;
  float scale;
  float scale_log2;  ///< For a softmax in powers of two.
  int folded;        ///< The maps' channels run through all heads, and their last dim is the batch; see maps.h.

  GNAFORGE_HD int tiles() const { return first_tile[max_slices]; }

  /// The slice that Q tile `tile` is of.
  GNAFORGE_HD int slice_of(int tile) const {
    int slice = 0;
    if (tile < first_tile[1]) return slice;  // mostly
    GNAFORGE_UNROLL
    for (int s = 1; s < max_slices; ++s) slice += tile >= first_tile[s];
    return slice;
  }

  /// Q tiles of `extent` that a slice has along `d`.
  GNAFORGE_HD Divisor q_tiles(int slice, int d, Divisor extent) const {
    return {extent.quotient_up(length[slice][d]), q_tiles_factor[slice][d], q_tiles_shift[slice] >> (8 * d) & 31};
  }

  /// The axis that a slice's dilation group is along `d`.
  GNAFORGE_HD Axis axis_of(int slice, int d) const {
    Axis own = axis[d];
    own.length = length[slice][d];
    return own;
  }
};
static_assert(sizeof(Params<3>) <= 4096, "room for parameters");

}  // namespace gnaforge::gpu
