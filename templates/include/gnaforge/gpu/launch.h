// Turns calls into launches of a kernel that takes Params: slices of several calls share one as far as it has room.
// Host only.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <cstring>

#include "gnaforge/entry.h"
#include "gnaforge/gpu/maps.h"
#include "gnaforge/gpu/params.h"
#include "gnaforge/pattern.h"

namespace gnaforge::gpu {

/// Calls that run on one stream, in launches one after the other. `Config` and `L` are as in host.h.
template <class Config, class L>
class Launches {
  using QTile = typename Config::QTile;
  using KvTile = typename Config::KvTile;
  using Element = gpu::Element<Config::dtype>;
  static constexpr int rank = L::rank;
  using Params = gpu::Params<rank>;

 public:
  /// `shares`: there are several calls, which may share maps. `beside`: all have GNAFORGE_ARGS_BESIDE.
  Launches(EncodeTiled encode, int processors, void* stream, bool shares, bool beside, const Reason& reason)
      : encode_(encode), processors_(processors), stream_(stream), shares_(shares), reason_(reason) {
    params_.beside = beside && begins_early();
  }

  /// A call that has something to compute.
  gnaforge_code add(const gnaforge_args& args) {
    const gnaforge_problem& problem = *args.problem;
    Call call{args, {}, {}, false, false, -1, 0};
    for (int d = 0; d < rank; ++d) call.axes[d] = PatternAxis(problem, d);
    const bool apart = problem.batch > 1 && repeats_batch(args);
    call.folded = rank == 3 && L::may_fold && problem.batch > 1 && !apart && foldable<Element>(args);
    shape_extra_keys(call);
    if (slices_ > 0 && !agrees(call))
      if (const gnaforge_code code = flush()) return code;
    const std::int64_t batch_step = (rank == 3 && !call.folded) || apart ? 1 : problem.batch;
    Group group{};
    group.batch = batch_step;
    for (;;) {  // all dilation groups that have a query
      for (int d = 0; d < rank; ++d) group.key[d] = call.axes[d].first_key(call.axes[d].group_of(group.query[d]));
      for (group.batch_begin = 0; group.batch_begin < problem.batch; group.batch_begin += batch_step)
        if (const gnaforge_code code = add_slice(call, group)) return code;
      int d = rank - 1;
      for (; d >= 0; --d) {
        const PatternAxis& axis = call.axes[d];
        if (++group.query[d] < (axis.dilation < axis.q_tokens ? axis.dilation : axis.q_tokens)) break;
        group.query[d] = 0;
      }
      if (d < 0) return GNAFORGE_OK;
    }
  }

  /// Launches what has not been launched yet.
  gnaforge_code finish() { return slices_ == 0 ? GNAFORGE_OK : flush(); }

 private:
  static constexpr int most_sets = Params::room_bytes / static_cast<int>(sizeof(Maps));
  static constexpr int maps_of_set = sizeof(Maps) / sizeof(CUtensorMap);
  enum { q_map, k_map, v_map, out_map };

  /// Of Maps, or of ExtraMaps.
  struct Shapes {
    MapShape map[maps_of_set];
  };

  struct Call {
    const gnaforge_args& args;
    PatternAxis axes[rank];
    Shapes extra;
    bool has_extra, folded;
    int place;          ///< Of its CallParams in the launch; -1: it has none yet.
    int first_kv_head;  ///< Then, with extra keys: its first head among those of its ExtraMaps.
  };

  /// A dilation group, of all batch entries or of one.
  struct Group {
    std::int64_t query[rank], key[rank];  ///< Its first token in the query and in the key tensor.
    std::int64_t batch_begin, batch;
  };

  /// Where maps are in the launch.
  struct Found {
    int set;  ///< -1: nowhere.
    int first_head, first_kv_head;
  };

  static bool is_of_keys(int role) { return role_facts[role].tokens == Tokens::key; }

  static void* data_of(const Call& call, int role, const Group& group, std::int64_t size) {
    const gnaforge_tensor& tensor = *tensor_of(call.args, role);
    std::int64_t offset = group.batch_begin * tensor.batch_stride;
    for (int d = 0; d < rank; ++d) offset += (is_of_keys(role) ? group.key : group.query)[d] * tensor.token_stride[d];
    return static_cast<char*>(tensor.data) + offset * size;
  }

  /// Tokens from `first` on in steps of the dilation.
  static std::int64_t group_tokens(std::int64_t tokens, std::int64_t first, std::int64_t dilation) {
    return dilation == 1 ? tokens - first : (tokens - first + dilation - 1) / dilation;
  }

  static MapShape shape_of(const Call& call, int role, const Group& group, const int (&box)[rank]) {
    const gnaforge_tensor& tensor = *tensor_of(call.args, role);
    const Sizes sizes = sizes_of(*call.args.problem, role);
    const std::int64_t (&first)[rank] = is_of_keys(role) ? group.key : group.query;
    Extents<rank> extents{sizes.channels, sizes.heads, {}, group.batch};
    std::int64_t token_stride[rank];
    for (int d = 0; d < rank; ++d) {
      extents.tokens[d] = group_tokens(sizes.tokens[d], first[d], call.axes[d].dilation);
      token_stride[d] = tensor.token_stride[d] * call.axes[d].dilation;
    }
    return map_shape<Element, rank>(role, tensor, data_of(call, role, group, Element::bytes), extents, token_stride,
                                    box, call.folded);
  }

  static Shapes shapes_of(const Call& call, const Group& group) {
    int q_box[rank], kv_box[rank], out_box[rank];
    for (int d = 0; d < rank; ++d) {
      q_box[d] = L::q_box(d);
      kv_box[d] = KvTile::extent(d);
      out_box[d] = L::out_box(d);
    }
    return {{shape_of(call, GNAFORGE_Q, group, q_box), shape_of(call, GNAFORGE_K, group, kv_box),
             shape_of(call, GNAFORGE_V, group, kv_box), shape_of(call, GNAFORGE_OUT, group, out_box)}};
  }

  static void shape_extra_keys(Call& call) {
    for (int i = 0; i < maps_of_set; ++i) {
      const int role = GNAFORGE_EXTRA_K + i;  // K of all pieces, then V
      const gnaforge_tensor* const tensor = tensor_of(call.args, role);
      if (tensor == nullptr) continue;
      const Sizes sizes = sizes_of(*call.args.problem, role);
      const std::int64_t batch = tensor->batch_stride == 0 ? 1 : sizes.batch;
      call.has_extra = true;
      call.extra.map[i] =
          map_shape<Element, 1>(role, *tensor, tensor->data, {sizes.channels, sizes.heads, {sizes.tokens[0]}, batch},
                                {tensor->token_stride[0]}, {KvTile::volume}, false);
    }
  }

  /// Whether the call may share the launch: in these things all slices agree.
  bool agrees(const Call& call) const {
    return params_.scale == static_cast<float>(call.args.problem->scale) && (params_.folded != 0) == call.folded &&
           (params_.slices[0].log_sum_exp != nullptr) == (tensor_of(call.args, GNAFORGE_LSE) != nullptr);
  }

  /// Maps of the launch that show the same tensors, or tensors of which these are some heads. Heads of Q and of the
  /// output must begin at the same one, and those of K and V: at `kv_head` if that isn't negative.
  Found find(const Shapes& shapes, int kv_head) const {
    for (int set = 0; set < sets_; ++set) {
      std::int64_t first[maps_of_set];
      bool good = !is_extra_[set];
      for (int i = 0; good && i < maps_of_set; ++i) good = heads_after(shapes_[set].map[i], shapes.map[i], first[i]);
      if (good && first[q_map] == first[out_map] && first[k_map] == first[v_map] &&
          (kv_head < 0 || first[k_map] == kv_head))
        return {set, static_cast<int>(first[q_map]), static_cast<int>(first[k_map])};
    }
    return {-1, 0, 0};
  }

  /// The same of ExtraMaps, all of which must begin at one head.
  Found find_extra(const Shapes& shapes) const {
    for (int set = 0; set < sets_; ++set) {
      bool good = is_extra_[set];
      std::int64_t head = -1;
      for (int i = 0; good && i < maps_of_set; ++i) {
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
  gnaforge_code take(Found& found, const Shapes& shapes, bool extra) {
    const bool fresh = found.set < 0;
    if (fresh) {
      found.set = sets_++;
      shapes_[found.set] = shapes;
      is_extra_[found.set] = extra;
    }
    for (int i = 0; i < maps_of_set; ++i) {
      MapShape& shape = shapes_[found.set].map[i];
      const bool of_queries = !extra && (i == q_map || i == out_map);
      const bool grows = !fresh && add_heads(shape, shapes.map[i], of_queries ? found.first_head : found.first_kv_head);
      if (shape.rank == 0 || !(fresh || grows)) continue;
      CUtensorMap& map = reinterpret_cast<CUtensorMap*>(params_.room + Params::maps_offset(found.set))[i];
      if (const CUresult result = encode_map<Element>(encode_, map, shape))
        return reason_.refuse(GNAFORGE_FAILED, "the driver refuses a tensor map of %s (CUresult %d)",
                              role_facts[shape.role].name, static_cast<int>(result));
    }
    return GNAFORGE_OK;
  }

  gnaforge_code add_slice(Call& call, const Group& group) {
    const Shapes shapes = shapes_of(call, group);
    SliceParams<rank> slice{};
    std::int64_t tiles = group.batch * call.args.problem->heads;
    for (int d = 0; d < rank; ++d) {
      const std::int64_t number = call.axes[d].group_of(group.query[d]);
      const Band band = band_of(call.axes[d], number, 0);
      const Divisor q_tiles = make_divisor(ceil_div(band.queries, QTile::extent(d)));
      slice.group[d] = {
          band.queries,   band.phase,   band.begin_max, band.end_max, first_key_position(call.axes[d], number),
          q_tiles.factor, q_tiles.shift};
      tiles *= q_tiles.value;
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
      if ((own.set >= 0 || kv_head <= 0) && slices_ < max_slices &&
          params_.first_tile[slices_] + tiles <= L::max_tiles &&
          Params::fits(sets_ + (own.set < 0) + (needs_extra && extra.set < 0), calls_ + first)) {
        if (needs_extra) {
          if (const gnaforge_code code = take(extra, call.extra, true)) return code;
          call.first_kv_head = extra.first_kv_head;
        }
        if (const gnaforge_code code = take(own, shapes, false)) return code;
        if (first) add_call(call, extra.set);
        if (const gnaforge_tensor* const lse = tensor_of(call.args, GNAFORGE_LSE))
          slice.log_sum_exp = static_cast<float*>(data_of(call, GNAFORGE_LSE, group, sizeof(float))) -
                              own.first_head * lse->head_stride;
        slice.maps = Params::maps_offset(own.set);
        slice.call = Params::call_offset(call.place);
        slice.first_head = own.first_head;
        slice.first_kv_head = own.first_kv_head;
        slice.first_batch = static_cast<int>(group.batch_begin);
        const int end = params_.first_tile[slices_] + static_cast<int>(tiles);
        params_.slices[slices_++] = slice;
        for (int next = slices_; next <= max_slices; ++next) params_.first_tile[next] = end;
        return GNAFORGE_OK;
      }
      if (empty) return reason_.refuse(GNAFORGE_FAILED, "a launch has no room for one slice");
      if (const gnaforge_code code = flush()) return code;
      call.place = -1;
    }
  }

  /// Adds the call's CallParams.
  void add_call(Call& call, int extra_set) {
    const gnaforge_problem& problem = *call.args.problem;
    params_.folded = call.folded;
    params_.scale = static_cast<float>(problem.scale);
    params_.scale_log2 = static_cast<float>(problem.scale * 1.4426950408889634);
    CallParams<rank> own{};
    for (int d = 0; d < rank; ++d) {
      const Band band = band_of(call.axes[d], call.axes[d].group_of(0), 0);
      own.axis[d] = {band.stride, band.first, band.window,    band.begin_min, band.end_min,
                     band.ahead,  band.split, band.low_begin, band.low_slack, band.gap};
      if (call.axes[d].causal != GNAFORGE_CAUSAL_NONE) own.backwards |= 1 << d;
      if (band.split != -far_away || band.gap != 0) params_.has_sides = 1;
    }
    if (const gnaforge_tensor* const lse = tensor_of(call.args, GNAFORGE_LSE)) {
      own.lse_batch_stride = lse->batch_stride;
      own.lse_head_stride = lse->head_stride;
      for (int d = 0; d < rank; ++d) own.lse_token_stride[d] = lse->token_stride[d] * call.axes[d].dilation;
    }
    own.kv_heads = make_divisor(static_cast<int>(problem.kv_heads));
    own.heads_per_kv_head = make_divisor(static_cast<int>(problem.heads / problem.kv_heads));
    if (call.has_extra) own.extra_maps = Params::maps_offset(extra_set);
    for (int piece = 0; piece < GNAFORGE_MAX_EXTRA; ++piece) {
      if (problem.extra_tokens[piece] == 0) continue;
      own.extra_pieces = piece + 1;
      own.extra_tokens[piece] = static_cast<int>(problem.extra_tokens[piece]);
      if (const gnaforge_tensor* const lengths = tensor_of(call.args, GNAFORGE_EXTRA_LENGTHS + piece)) {
        own.extra_lengths[piece] = static_cast<const int*>(lengths->data);
        own.extra_lengths_stride[piece] = lengths->batch_stride;
      }
      if (tensor_of(call.args, GNAFORGE_EXTRA_K + piece)->batch_stride == 0) own.repeated |= 1 << 2 * piece;
      if (tensor_of(call.args, GNAFORGE_EXTRA_V + piece)->batch_stride == 0) own.repeated |= 2 << 2 * piece;
    }
    call.place = calls_++;
    std::memcpy(params_.room + Params::call_offset(call.place), &own, sizeof own);
  }

  /// Whether the driver takes launches that may begin early, also while a stream is captured into a graph: from CUDA
  /// 12.3 on (CUDA C++ Programming Guide, Programmatic Dependent Launch, Use in CUDA Graphs).
  static bool begins_early() {
    if (!L::begins_early) return false;
    static std::atomic<int> known{0};
    int version = known.load(std::memory_order_relaxed);
    if (version == 0 && cudaDriverGetVersion(&version) == cudaSuccess) known.store(version, std::memory_order_relaxed);
    return version >= 12030;
  }

  /// Launches what there is. The next launch may run beside it: slices are independent of each other.
  gnaforge_code flush() {
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(static_cast<unsigned>(min_int(params_.tiles(), processors_ * L::blocks_per_processor)));
    launch.blockDim = dim3(L::threads);
    launch.dynamicSmemBytes = L::shared_bytes;
    launch.stream = static_cast<cudaStream_t>(stream_);
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    if (begins_early()) {
      launch.attrs = &early;
      launch.numAttrs = 1;
    }
    void* arguments[] = {&params_};
    const cudaError_t error = cudaLaunchKernelExC(&launch, Config::kernel(), arguments);
    params_.beside = begins_early();
    slices_ = sets_ = calls_ = params_.has_sides = 0;
    if (error == cudaSuccess) return GNAFORGE_OK;
    cudaGetLastError();
    return reason_.refuse(GNAFORGE_FAILED, "the launch failed: %s", cudaGetErrorString(error));
  }

  EncodeTiled encode_;
  int processors_;
  void* stream_;
  bool shares_;
  Reason reason_;
  Params params_{};
  int slices_ = 0, sets_ = 0, calls_ = 0;
  Shapes shapes_[most_sets];  ///< Of the maps that are in the launch,
  bool is_extra_[most_sets];  ///< and whether they are ExtraMaps.
};

}  // namespace gnaforge::gpu
