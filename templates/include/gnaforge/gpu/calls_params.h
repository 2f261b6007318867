// What the host part hands to the kernel: as params.h has it, for slices of several calls and for extra keys. Host and
// device.
#pragma once

#include <cstdint>
#include <type_traits>

#include "gnaforge/abi.h"
#include "gnaforge/gpu/extra_keys.h"
#include "gnaforge/gpu/params.h"

namespace gnaforge::gpu {

/// Maps of a kernel whose threads store the output.
struct InputMaps {
  CUtensorMap q, k, v;
};

/// Who stores the output: copies, by a map, or threads, who take an address.
enum class StoredBy { copies, threads };

/// What of a call's output threads take to know; nothing where copies store.
template <int Rank, StoredBy Whom>
struct OutOfCall {};
template <int Rank>
struct OutOfCall<Rank, StoredBy::threads> {
  std::int64_t out_batch_stride, out_head_stride, out_token_stride[Rank];
};

/// And of a slice's.
template <StoredBy Whom>
struct OutOfSlice {};
template <>
struct OutOfSlice<StoredBy::threads> {
  void* out;  ///< Of the first query and of head 0 of the maps.
};

/// Of a call, what kernels of some families take to know beyond that: here nothing. `of` says it of a call.
struct NothingMore {
  static NothingMore of(const gnaforge_args&) { return {}; }
};

/// What slices of one call have in common. `More` is NothingMore, or what stands for it.
template <int Rank, StoredBy Whom, class More = NothingMore>
struct CallParams : OutOfCall<Rank, Whom>, More {
  AxisParams axis[Rank];
  std::int64_t lse_batch_stride, lse_head_stride, lse_token_stride[Rank];
  Divisor kv_heads;
  Divisor heads_per_kv_head;  ///< Over those of a Q tile.
  int backwards;              ///< Bit d: Q tiles that come last along axis d are worked on first.
  int extra_maps;             ///< Where in CallsParams::room its ExtraMaps are.
  ExtraKeys extra;
};

/// A dilation group of a call, of all batch entries or of one.
template <int Rank, StoredBy Whom>
struct SliceParams : OutOfSlice<Whom> {
  float* log_sum_exp;  ///< Of the first query and of head 0 of the maps; null if the caller wants none.
  GroupParams group[Rank];
  int maps, call;                 ///< Where in CallsParams::room they are.
  int first_head, first_kv_head;  ///< Of its heads, among those of the maps.
  int first_batch;                ///< Of its batch entries, among those of the call.
};

constexpr int max_calls_slices = 10;  ///< Of one launch; see max_slices.

/// One launch.
template <int Rank, StoredBy Whom, class More = NothingMore>
struct CallsParams {
  static constexpr StoredBy stored_by = Whom;
  using Call = CallParams<Rank, Whom, More>;
  using Slice = SliceParams<Rank, Whom>;
  using Maps = std::conditional_t<Whom == StoredBy::copies, gpu::Maps, InputMaps>;
  static constexpr bool several_calls = true, takes_extra_keys = true;  ///< As params.h says.
  static constexpr int room_bytes =
      (max_param_bytes - 64 - max_calls_slices * static_cast<int>(sizeof(Slice))) / 64 * 64;

  /// Maps and ExtraMaps from the front on, CallParams from the back: some launches have many of these, some of those.
  alignas(64) unsigned char room[room_bytes];
  Slice slices[max_calls_slices];
  int first_tile[max_calls_slices + 1];  ///< Of each slice; from the last one's end on, how many there are.
  float scale;
  float scale_log2;  ///< For a softmax in powers of two.
  int folded;        ///< The maps' channels run through all heads, and their last dim is the batch; see maps.h.
  int has_sides;     ///< Whether some axis of some call has a split or a gap: see Band.

  static constexpr int maps_offset(int place) { return place * static_cast<int>(sizeof(CUtensorMap)); }
  static constexpr int call_offset(int place) { return room_bytes - (place + 1) * static_cast<int>(sizeof(Call)); }
  /// Whether there is room for so many maps and CallParams.
  static constexpr bool fits(int maps, int calls) { return maps_offset(maps) <= call_offset(calls - 1); }

  GNAFORGE_HD int tiles() const { return first_tile[max_calls_slices]; }

  /// The slice that Q tile `tile` is of.
  GNAFORGE_HD int slice_of(int tile) const {
    int slice = 0;
    if (tile < first_tile[1]) return slice;  // mostly
    GNAFORGE_UNROLL
    for (int s = 1; s < max_calls_slices; ++s) slice += tile >= first_tile[s];
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
    return make_pattern<Pattern>(group(slice, d), call(slice).axis[d]);
  }
};
template <StoredBy Whom>
constexpr bool fit_a_launch =
    sizeof(CallsParams<1, Whom>) <= max_param_bytes && sizeof(CallsParams<2, Whom>) <= max_param_bytes &&
    sizeof(CallsParams<3, Whom>) <= max_param_bytes;
static_assert(fit_a_launch<StoredBy::copies> && fit_a_launch<StoredBy::threads>, "room for parameters");

}  // namespace gnaforge::gpu
