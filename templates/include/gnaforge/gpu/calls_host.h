// The entry of a forward kernel that takes lists of calls: turns them into launches. Slices of several calls share one
// as far as it has room, and maps where heads of one tensor are in several calls. Host only.
#pragma once

#include <cstdint>
#include <cstring>

#include "gnaforge/gpu/calls_params.h"
#include "gnaforge/gpu/extra_host.h"
#include "gnaforge/gpu/host.h"

namespace gnaforge::gpu {

constexpr int most_maps_of_set = sizeof(Maps) / sizeof(CUtensorMap);
static_assert(maps_of_extra <= most_maps_of_set, "room for a set of either");

/// A set of maps: of Maps or InputMaps, in their order, or of ExtraMaps.
struct MapShapes {
  int count;
  MapShape map[most_maps_of_set];
};

/// Whether `other` shows heads of a tensor whose first ones `one` shows, and which of them comes `first`. A map of both
/// is one of a tensor too: no two of its dims overlap.
inline bool heads_after(const MapShape& one, const MapShape& other, std::int64_t& first) {
  first = 0;
  if (one.rank != other.rank) return false;
  if (one.rank == 0) return true;
  for (int i = 0; i < one.rank; ++i)
    if (one.strides[i] != other.strides[i] || one.box[i] != other.box[i] ||
        (i != one.head_axis && one.dims[i] != other.dims[i]))
      return false;
  if (one.head_axis != other.head_axis || one.head_unit != other.head_unit) return false;
  const std::int64_t distance = other.data - one.data;
  if (distance == 0 && one.dims[one.head_axis] == other.dims[one.head_axis]) return true;
  // A map takes strides in multiples of 16 bytes; that of a single head may be any.
  if (one.head_bytes <= 0 || one.head_bytes % 16 != 0 || distance < 0 || distance % one.head_bytes != 0) return false;
  first = distance / one.head_bytes;
  const std::int64_t end = distance + other.dims[one.head_axis] / one.head_unit * one.head_bytes;
  if (end / one.head_bytes * one.head_unit > max_axis_length) return false;
  for (int i = 1; i < one.rank; ++i)
    if (i != one.head_axis && one.dims[i] > 1 && one.strides[i] < end && one.strides[i] * one.dims[i] > one.head_bytes)
      return false;
  return true;
}

/// Makes `one` show the heads of `other` too, from `first` on; false if it does already.
inline bool add_heads(MapShape& one, const MapShape& other, std::int64_t first) {
  if (one.rank == 0) return false;
  const std::int64_t end = first * one.head_unit + other.dims[one.head_axis];
  if (end <= one.dims[one.head_axis]) return false;
  one.dims[one.head_axis] = end;
  return true;
}

/// Calls that run on one stream, in launches one after the other. `Config` and `L` are as in host.h; L also says who
/// stores the output, in `stored_by`, and has in `OfCall` what CallParams takes as `More`.
template <class Config, class L>
class Launches {
  using Base = Entry<Config, L>;
  using KvTile = typename Config::KvTile;
  using Element = gpu::Element<Config::dtype>;
  static constexpr int rank = L::rank;
  using Params = CallsParams<rank, L::stored_by, typename L::OfCall>;
  static_assert(sizeof(Params) <= max_param_bytes, "room for parameters");
  static_assert(Params::fits((sizeof(typename Params::Maps) + sizeof(ExtraMaps)) / sizeof(CUtensorMap), 1),
                "room for a slice with extra keys");
  static constexpr int out_bytes = dtype_bytes(Config::out_dtype);
  static constexpr bool threads_store = L::stored_by == StoredBy::threads;
  using Slice = typename Base::Slice;

 public:
  /// `shares`: there are several calls, which may share maps.
  Launches(const typename Base::Machine& machine, void* stream, bool shares, const Reason& reason)
      : machine_(machine), stream_(stream), shares_(shares), reason_(reason) {}

  /// A call that has something to compute.
  gnaforge_code add(const gnaforge_args& args) {
    const typename Base::Batching batching = Base::batching_of(args);
    Call call{args, {}, {}, {maps_of_extra, {}}, false, -1, 0};
    Base::copy_patterns(*args.problem, call.axes);
    call.common = Base::common_params(args, call.axes, batching.folded);
    call.has_extra = shape_extra_keys<Element>(call.extra.map, args, KvTile::volume);
    if (slices_ > 0 && !agrees(call))
      if (const gnaforge_code code = flush()) return code;
    return Base::for_each_slice(args, call.axes, batching.step,
                                [&](const Slice& slice) { return add_slice(call, slice); });
  }

  /// Launches what has not been launched yet.
  gnaforge_code finish() { return slices_ == 0 ? GNAFORGE_OK : flush(); }

 private:
  static constexpr int maps_of_tensors = sizeof(typename Params::Maps) / sizeof(CUtensorMap);
  static constexpr int most_sets = Params::room_bytes / static_cast<int>(sizeof(typename Params::Maps));
  enum { q_map, k_map, v_map, out_map };

  struct Call {
    const gnaforge_args& args;
    PatternAxis axes[rank];
    gpu::Params<rank> common;  ///< What all slices of the call have in common.
    MapShapes extra;
    bool has_extra;
    int place;          ///< Of its CallParams in the launch; -1: it has none yet.
    int first_kv_head;  ///< Then, with extra keys: its first head among those of its ExtraMaps.
  };

  /// Where maps are in the launch.
  struct Found {
    int set;  ///< -1: nowhere.
    int first_head, first_kv_head;
  };

  static MapShapes shapes_of(const Call& call, const Slice& slice) {
    int q_box[rank], kv_box[rank], out_box[rank];
    for (int d = 0; d < rank; ++d) {
      q_box[d] = L::q_box(d);
      kv_box[d] = KvTile::extent(d);
      out_box[d] = L::out_box(d);
    }
    const auto shape = [&](int role, const int (&box)[rank]) {
      return Base::shape_of(call.args, role, call.common.folded != 0, call.axes, slice, box);
    };
    MapShapes shapes{maps_of_tensors, {shape(GNAFORGE_Q, q_box), shape(GNAFORGE_K, kv_box), shape(GNAFORGE_V, kv_box)}};
    if (!threads_store) shapes.map[out_map] = shape(GNAFORGE_OUT, out_box);
    return shapes;
  }

  /// Whether the call may share the launch: in these things all slices agree.
  bool agrees(const Call& call) const {
    return params_.scale == call.common.scale && params_.folded == call.common.folded &&
           (params_.slices[0].log_sum_exp != nullptr) == (tensor_of(call.args, GNAFORGE_LSE) != nullptr);
  }

  /// Maps of the launch that show the same tensors, or tensors of which these are some heads. Heads of Q and of the
  /// output must begin at the same one, and those of K and V: at `kv_head` if that isn't negative.
  Found find(const MapShapes& shapes, int kv_head) const {
    for (int set = 0; set < sets_; ++set) {
      std::int64_t first[most_maps_of_set];
      bool good = !is_extra_[set];
      for (int i = 0; good && i < shapes.count; ++i) good = heads_after(shapes_[set].map[i], shapes.map[i], first[i]);
      if (good && (threads_store || first[q_map] == first[out_map]) && first[k_map] == first[v_map] &&
          (kv_head < 0 || first[k_map] == kv_head))
        return {set, static_cast<int>(first[q_map]), static_cast<int>(first[k_map])};
    }
    return {-1, 0, 0};
  }

  /// The same of ExtraMaps, all of which must begin at one head.
  Found find_extra(const MapShapes& shapes) const {
    for (int set = 0; set < sets_; ++set) {
      bool good = is_extra_[set];
      std::int64_t head = -1;
      for (int i = 0; good && i < shapes.count; ++i) {
        std::int64_t first = 0;
        good = heads_after(shapes_[set].map[i], shapes.map[i], first);
        if (shapes.map[i].rank == 0) continue;
        good = good && (head < 0 || head == first);
        head = first;
      }
      if (good) return {set, 0, static_cast<int>(head)};
    }
    return {-1, 0, 0};
  }

  /// Makes the maps that were not found, and those larger that lack heads.
  gnaforge_code take(Found& found, const MapShapes& shapes, bool extra) {
    const bool fresh = found.set < 0;
    if (fresh) {
      found.set = sets_++;
      shapes_[found.set] = shapes;
      is_extra_[found.set] = extra;
      first_map_[found.set] = maps_;
      maps_ += shapes.count;
    }
    bool stale[most_maps_of_set];
    for (int i = 0; i < shapes.count; ++i) {
      const bool of_queries = !extra && (i == q_map || i == out_map);
      stale[i] = fresh || add_heads(shapes_[found.set].map[i], shapes.map[i],
                                    of_queries ? found.first_head : found.first_kv_head);
    }
    auto* const maps = reinterpret_cast<CUtensorMap*>(params_.room + Params::maps_offset(first_map_[found.set]));
    for (int i = 0; i < shapes.count; ++i) {
      const MapShape& shape = shapes_[found.set].map[i];
      if (!stale[i] || shape.rank == 0) continue;
      if (const gnaforge_code code = Base::map(machine_.encode, maps[i], shape, reason_)) return code;
    }
    return GNAFORGE_OK;
  }

  gnaforge_code add_slice(Call& call, const Slice& slice) {
    const MapShapes shapes = shapes_of(call, slice);
    typename Params::Slice made{};
    std::int64_t tiles = slice.batch * call.args.problem->heads / Config::q_tile_heads;
    for (int d = 0; d < rank; ++d) {
      made.group[d] = Base::group_of(call.common, call.axes[d], slice, d);
      tiles *= ceil_div(made.group[d].queries, Config::QTile::extent(d));
    }
    for (bool empty = slices_ == 0;; empty = true) {
      const bool first = call.place < 0, needs_extra = first && call.has_extra;
      Found extra{-1, 0, 0}, own{-1, 0, 0};
      if (shares_ && needs_extra) extra = find_extra(call.extra);
      int kv_head = !call.has_extra ? -1 : first ? extra.first_kv_head : call.first_kv_head;
      if (shares_) own = find(shapes, kv_head);
      if (needs_extra && own.set < 0 && kv_head > 0) {  // fresh maps for both, then
        extra = {-1, 0, 0};
        kv_head = 0;
      }
      if ((own.set >= 0 || kv_head <= 0) && slices_ < max_calls_slices &&
          params_.first_tile[slices_] + tiles <= L::max_tiles &&
          Params::fits(maps_ + (own.set < 0 ? maps_of_tensors : 0) + (needs_extra && extra.set < 0 ? maps_of_extra : 0),
                       calls_ + first)) {
        if (needs_extra) {
          if (const gnaforge_code code = take(extra, call.extra, true)) return code;
          call.first_kv_head = extra.first_kv_head;
        }
        if (const gnaforge_code code = take(own, shapes, false)) return code;
        if (first) add_call(call, extra.set);
        if (const gnaforge_tensor* const lse = tensor_of(call.args, GNAFORGE_LSE))
          made.log_sum_exp = static_cast<float*>(Base::data_of(call.args, GNAFORGE_LSE, slice, sizeof(float))) -
                             own.first_head * lse->head_stride;
        if constexpr (threads_store) {
          const gnaforge_tensor& out = *tensor_of(call.args, GNAFORGE_OUT);
          made.out = static_cast<char*>(Base::data_of(call.args, GNAFORGE_OUT, slice, out_bytes)) -
                     own.first_head * out.head_stride * out_bytes;
        }
        made.maps = Params::maps_offset(first_map_[own.set]);
        made.call = Params::call_offset(call.place);
        made.first_head = own.first_head;
        made.first_kv_head = own.first_kv_head;
        made.first_batch = static_cast<int>(slice.batch_begin);
        const int end = params_.first_tile[slices_] + static_cast<int>(tiles);
        params_.slices[slices_++] = made;
        for (int next = slices_; next <= max_calls_slices; ++next) params_.first_tile[next] = end;
        return GNAFORGE_OK;
      }
      if (empty) return reason_.refuse(GNAFORGE_FAILED, "a launch has no room for one slice");
      if (const gnaforge_code code = flush()) return code;
      call.place = -1;
    }
  }

  /// Adds the call's CallParams.
  void add_call(Call& call, int extra_set) {
    params_.folded = call.common.folded;
    params_.scale = call.common.scale;
    params_.scale_log2 = call.common.scale_log2;
    if (call.common.has_sides) params_.has_sides = 1;
    typename Params::Call own{};
    static_cast<typename L::OfCall&>(own) = L::OfCall::of(call.args);
    for (int d = 0; d < rank; ++d) {
      own.axis[d] = call.common.axis[d];
      own.lse_token_stride[d] = call.common.lse_token_stride[d];
    }
    if constexpr (threads_store) {
      const gnaforge_tensor& out = *tensor_of(call.args, GNAFORGE_OUT);
      own.out_batch_stride = out.batch_stride;
      own.out_head_stride = out.head_stride;
      for (int d = 0; d < rank; ++d) own.out_token_stride[d] = out.token_stride[d] * call.axes[d].dilation;
    }
    own.lse_batch_stride = call.common.lse_batch_stride;
    own.lse_head_stride = call.common.lse_head_stride;
    own.kv_heads = call.common.kv_heads;
    own.heads_per_kv_head = call.common.heads_per_kv_head;
    own.backwards = call.common.backwards;
    if (call.has_extra) own.extra_maps = Params::maps_offset(first_map_[extra_set]);
    own.extra = extra_keys_of(call.args);
    call.place = calls_++;
    std::memcpy(params_.room + Params::call_offset(call.place), &own, sizeof own);
  }

  gnaforge_code flush() {
    const gnaforge_code code = Base::launch_kernel(params_, machine_.processors, stream_, reason_);
    slices_ = sets_ = maps_ = calls_ = params_.has_sides = 0;
    return code;
  }

  typename Base::Machine machine_;
  void* stream_;
  bool shares_;
  Reason reason_;
  Params params_{};
  int slices_ = 0, sets_ = 0, maps_ = 0, calls_ = 0;
  MapShapes shapes_[most_sets];  ///< Of the maps that are in the launch,
  bool is_extra_[most_sets];     ///< whether they are ExtraMaps,
  int first_map_[most_sets];     ///< and which number their first one has.
};

/// Takes lists of calls.
template <class Config, class L>
struct CallsEntry : Entry<Config, L> {
  using Base = Entry<Config, L>;

  static int run(const gnaforge_args* args, void* workspace, void* stream, char* error, std::size_t n) {
    return run_calls(&args, 1, workspace, stream, error, n);
  }

  static std::int64_t calls_workspace_bytes(const gnaforge_args* const*, std::int64_t) { return 0; }

  static int run_calls(const gnaforge_args* const* calls, std::int64_t count, void*, void* stream, char* error,
                       std::size_t n) {
    const Reason reason{error, n};
    bool any = false;
    for (std::int64_t i = 0; i < count; ++i) {
      if (is_empty(*calls[i])) continue;
      if (const gnaforge_code code = gnaforge::check::data(*calls[i], reason)) return code;
      any = true;
    }
    if (!any) return GNAFORGE_OK;
    typename Base::Machine machine{};
    if (const gnaforge_code code = Base::find_machine(*calls[0], machine, reason)) return code;
    Launches<Config, L> launches(machine, stream, count > 1, reason);
    for (std::int64_t i = 0; i < count; ++i)
      if (!is_empty(*calls[i]))
        if (const gnaforge_code code = launches.add(*calls[i])) return code;
    return launches.finish();
  }

 private:
  static bool is_empty(const gnaforge_args& call) { return call.problem->batch == 0 || call.problem->heads == 0; }
};

template <class Config, class L>
constexpr gnaforge_entry make_calls_entry() {
  return make_entry<Config, L, CallsEntry<Config, L>>();
}

}  // namespace gnaforge::gpu
