// What the host part hands to the kernel: as gpu/params.h has it, for slices of several calls and for extra keys. Host
// and device.
#pragma once

#include <cstdint>

#include "gnaforge/abi.h"
#include "gnaforge/gpu/params.h"
#include "gnaforge/sm90/extra_keys.h"

namespace gnaforge::sm90 {

using gpu::AxisParams;
using gpu::GroupParams;
using gpu::Maps;

static_assert(sizeof(ExtraMaps) == sizeof(Maps), "places for either");

/// What slices of one call have in common.
template <int Rank>
struct CallParams {
  AxisParams axis[Rank];
  std::int64_t lse_batch_stride, lse_head_stride, lse_token_stride[Rank];
  Divisor kv_heads;
  Divisor heads_per_kv_head;
  int backwards;   ///< Bit d: Q tiles that come last along axis d are worked on first.
  int extra_maps;  ///< Where in Params::room its ExtraMaps are.
  ExtraKeys extra;
};

/// A dilation group of a call, of all batch entries or of one.
template <int Rank>
struct SliceParams {
  float* log_sum_exp;  ///< Of the first query and of head 0 of the maps; null if the caller wants none.
  GroupParams group[Rank];
  int maps, call;                 ///< Where in Params::room its Maps and its CallParams are.
  int first_head, first_kv_head;  ///< Of its heads, among those of the maps.
  int first_batch;                ///< Of its batch entries, among those of the call.
};

constexpr int max_slices = 10;  ///< Of one launch; see gpu/params.h.
using gpu::max_param_bytes;     ///< That every driver takes; more would make each launch take longer.

/// One launch.
template <int Rank>
struct Params {
  using Call = CallParams<Rank>;
  using Slice = SliceParams<Rank>;
  static constexpr bool several_calls = true, takes_extra_keys = true;  ///< As gpu/params.h says.
  static constexpr int room_bytes = (max_param_bytes - 64 - max_slices * static_cast<int>(sizeof(Slice))) / 64 * 64;

  /// Maps from the front on and CallParams from the back: some launches have many of these, some of those.
  alignas(64) unsigned char room[room_bytes];
  Slice slices[max_slices];
  int first_tile[max_slices + 1];  ///< Of each slice; from the last one's end on, how many there are.
  float scale;
  float scale_log2;  ///< For a softmax in powers of two.
  int folded;        ///< The maps' channels run through all heads, and their last dim is the batch; see maps.h.
  int has_sides;     ///< Whether some axis of some call has a split or a gap: see Band.

  static constexpr int maps_offset(int place) { return place * static_cast<int>(sizeof(Maps)); }
  static constexpr int call_offset(int place) { return room_bytes - (place + 1) * static_cast<int>(sizeof(Call)); }
  /// Whether there is room for so many Maps, or ExtraMaps, and CallParams.
  static constexpr bool fits(int maps, int calls) { return maps_offset(maps) <= call_offset(calls - 1); }

  GNAFORGE_HD int tiles() const { return first_tile[max_slices]; }

  /// The slice that Q tile `tile` is of.
  GNAFORGE_HD int slice_of(int tile) const {
    int slice = 0;
    if (tile < first_tile[1]) return slice;  // mostly
    GNAFORGE_UNROLL
    for (int s = 1; s < max_slices; ++s) slice += tile >= first_tile[s];
    return slice;
  }

  GNAFORGE_HD const Maps& maps_at(int offset) const { return *reinterpret_cast<const Maps*>(room + offset); }

  GNAFORGE_HD const Maps& maps(int slice) const { return maps_at(slices[slice].maps); }
  GNAFORGE_HD const Call& call(int slice) const { return *reinterpret_cast<const Call*>(room + slices[slice].call); }
  GNAFORGE_HD const ExtraKeys& extra(int slice) const { return call(slice).extra; }
  GNAFORGE_HD const ExtraMaps& extra_maps(int slice) const {
    return *reinterpret_cast<const ExtraMaps*>(room + call(slice).extra_maps);
  }

  /// The first batch entry of a slice, among those of its call.
  GNAFORGE_HD int first_batch(int slice) const { return slices[slice].first_batch; }

  GNAFORGE_HD const GroupParams& group(int slice, int d) const { return slices[slice].group[d]; }

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
    return gpu::make_pattern<Pattern>(group(slice, d), call(slice).axis[d]);
  }
};
static_assert(Params<3>::fits(2, 1), "room for a slice with extra keys");
static_assert(sizeof(Params<1>) <= max_param_bytes && sizeof(Params<2>) <= max_param_bytes &&
                  sizeof(Params<3>) <= max_param_bytes,
              "room for parameters");

}  // namespace gnaforge::sm90
