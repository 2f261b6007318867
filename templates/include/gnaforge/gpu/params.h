// What the host part hands to the kernel. Host and device.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "gnaforge/gna/band.h"

namespace gnaforge::gpu {

/// What one slice is read and written by: a dilation group of all batch entries or of one (see maps.h). Maps hold base
/// addresses and strides, so rows are within the group.
struct Maps {
  CUtensorMap q, k, v, out;
};

/// Slices of one launch. They are parameters, which a CUDA graph copies, and not in memory, where someone would have to
/// put them and to fence: as many as leave room for the rest in the 4 KB that every driver takes.
constexpr int max_slices = 7;

/// Different dilation groups along single axes that slices of one launch may be made of. A call over the whole grid has
/// two of each axis at most.
constexpr int max_groups = 6;

/// What of a Band is the same for all dilation groups along an axis, once keys are counted from the first position of
/// the grid on.
struct AxisParams {
  Divisor stride;
  int first, window, begin_min, end_min, ahead;
  int split, low_begin, low_slack, gap;
};

/// And what isn't.
struct GroupParams {
  int queries, phase, begin_max, end_max;  ///< Of a Band.
  int kv_begin;                            ///< Position of the first key that is stored.
  unsigned q_tiles_factor;                 ///< Of a Divisor: how many Q tiles the group has along the axis.
  int q_tiles_shift;

  friend bool operator==(const GroupParams& a, const GroupParams& b) {
    return a.queries == b.queries && a.phase == b.phase && a.begin_max == b.begin_max && a.end_max == b.end_max &&
           a.kv_begin == b.kv_begin && a.q_tiles_factor == b.q_tiles_factor && a.q_tiles_shift == b.q_tiles_shift;
  }
};

/// What queries of a group see along an axis, in the form that a tile source takes: a Band, or an Axis where the call
/// is over the whole grid, with windows that shift inwards at its ends.
template <class Pattern>
GNAFORGE_HD Pattern make_pattern(const GroupParams& own, const AxisParams& all) {
  if constexpr (std::is_same_v<Pattern, Band>)
    return {own.queries, all.stride,  own.phase, all.first, all.window,    all.begin_min, own.begin_max,
            all.end_min, own.end_max, all.ahead, all.split, all.low_begin, all.low_slack, all.gap};
  else
    return {own.queries, all.window, all.stride, 1, all.ahead < far_away};
}

/// One launch, of `Slices` slices at most that are read and written by a `SliceMaps` each.
template <int Rank, class SliceMaps, int Slices>
struct LaunchParams {
  static constexpr int slices = Slices;
  static constexpr bool several_calls = false;     ///< Slices may be of several calls.
  static constexpr bool takes_extra_keys = false;  ///< They may have extra keys.

  SliceMaps maps[slices];
  float* log_sum_exp[slices];  ///< Of the slice's first query; null if the caller wants none.
  GroupParams groups[max_groups];
  int groups_of[slices];       ///< Byte d says which one a slice is of along axis d.
  int first_tile[slices + 1];  ///< Of each slice; from the last one's end on, how many there are.
  std::int64_t lse_batch_stride, lse_head_stride, lse_token_stride[Rank];
  AxisParams axis[Rank];
  Divisor kv_heads;
  Divisor heads_per_kv_head;
  float scale;
  float scale_log2;         ///< For a softmax in powers of two.
  int folded;               ///< The maps' channels run through all heads, and their last dim is the batch; see maps.h.
  std::uint16_t has_sides;  ///< Whether some axis has a split or a gap: see Band.
  std::uint16_t backwards;  ///< Bit d: Q tiles that come last along axis d are worked on first.

  GNAFORGE_HD int tiles() const { return first_tile[slices]; }

  /// The slice that Q tile `tile` is of.
  GNAFORGE_HD int slice_of(int tile) const {
    int slice = 0;
    if (tile < first_tile[1]) return slice;  // mostly
    GNAFORGE_UNROLL
    for (int s = 1; s < slices; ++s) slice += tile >= first_tile[s];
    return slice;
  }

  GNAFORGE_HD const GroupParams& group(int slice, int d) const { return groups[groups_of[slice] >> (8 * d) & 0xFF]; }

  /// What slices of one call have in common: here all are of one.
  GNAFORGE_HD const LaunchParams& call(int) const { return *this; }

  /// Queries of a slice along `d`.
  GNAFORGE_HD int queries(int slice, int d) const { return group(slice, d).queries; }

  /// Q tiles of `extent` that a slice has along `d`.
  GNAFORGE_HD Divisor q_tiles(int slice, int d, Divisor extent) const {
    const GroupParams& own = group(slice, d);
    return {extent.quotient_up(own.queries), own.q_tiles_factor, own.q_tiles_shift};
  }

  /// What queries of a slice see along `d`.
  template <class Pattern>
  GNAFORGE_HD Pattern pattern(int slice, int d) const {
    return make_pattern<Pattern>(group(slice, d), axis[d]);
  }
};
constexpr int max_param_bytes = 4096;

/// Of a forward kernel.
template <int Rank>
using Params = LaunchParams<Rank, Maps, max_slices>;
static_assert(sizeof(Params<3>) <= max_param_bytes, "room for parameters");

}  // namespace gnaforge::gpu
