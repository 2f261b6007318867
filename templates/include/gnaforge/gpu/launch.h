// Launches of a kernel, and the slices of calls that they work through. Host only.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

#include "gnaforge/entry.h"
#include "gnaforge/gpu/maps.h"
#include "gnaforge/gpu/params.h"
#include "gnaforge/pattern.h"

namespace gnaforge::gpu {

/// Where launches go.
struct Target {
  EncodeTiled encode;
  int processors;
  void* stream;
};

/// A dilation group of a call, of all batch entries or of one.
template <int Rank>
struct Slice {
  std::int64_t query[Rank], key[Rank];  ///< Its first token in the query and in the key tensor.
  std::int64_t batch_begin, batch;
};

constexpr int maps_of_set = sizeof(Maps) / sizeof(CUtensorMap);

/// Of a set of maps: of Maps, in their order, or of what takes their place.
struct MapShapes {
  MapShape map[maps_of_set];
};

/// A call and its slices. `Config` and `L` are as in host.h.
template <class Config, class L>
struct SlicedCall {
  using QTile = typename Config::QTile;
  using KvTile = typename Config::KvTile;
  using Element = gpu::Element<Config::dtype>;
  static constexpr int rank = L::rank;
  using Slice = gpu::Slice<rank>;

  const gnaforge_args& args;
  PatternAxis axes[rank];
  bool apart;   ///< Batch entries have maps of their own because some are one.
  bool folded;  ///< Heads are folded into the maps' channels: see maps.h.

  explicit SlicedCall(const gnaforge_args& call)
      : args(call), apart(call.problem->batch > 1 && repeats_batch(call)), folded(false) {
    for (int d = 0; d < rank; ++d) axes[d] = PatternAxis(*args.problem, d);
    folded = rank == 3 && L::may_fold && args.problem->batch > 1 && !apart && foldable<Element>(args);
  }

  /// Calls `add(slice)` for all dilation groups that have a query; ends when it returns an error.
  template <class Add>
  gnaforge_code for_each_slice(const Add& add) const {
    const std::int64_t batch = args.problem->batch;
    Slice slice{};
    slice.batch = (rank == 3 && !folded) || apart ? 1 : batch;
    for (;;) {
      for (int d = 0; d < rank; ++d) slice.key[d] = axes[d].first_key(axes[d].group_of(slice.query[d]));
      for (slice.batch_begin = 0; slice.batch_begin < batch; slice.batch_begin += slice.batch)
        if (const gnaforge_code code = add(slice)) return code;
      int d = rank - 1;
      while (d >= 0 && ++slice.query[d] == (axes[d].dilation < axes[d].q_tokens ? axes[d].dilation : axes[d].q_tokens))
        slice.query[d--] = 0;
      if (d < 0) return GNAFORGE_OK;
    }
  }

  /// Of the slice's first token, of batch entry and head 0.
  void* data_of(int role, const Slice& slice, std::int64_t size) const {
    const gnaforge_tensor& tensor = *tensor_of(args, role);
    std::int64_t offset = slice.batch_begin * tensor.batch_stride;
    for (int d = 0; d < rank; ++d) offset += first(role, slice)[d] * tensor.token_stride[d];
    return static_cast<char*>(tensor.data) + offset * size;
  }

  float* log_sum_exp(const Slice& slice) const {
    if (tensor_of(args, GNAFORGE_LSE) == nullptr) return nullptr;
    return static_cast<float*>(data_of(GNAFORGE_LSE, slice, sizeof(float)));
  }

  /// What Maps show of the slice.
  MapShapes shapes_of(const Slice& slice) const {
    int q_box[rank], kv_box[rank], out_box[rank];
    for (int d = 0; d < rank; ++d) {
      q_box[d] = L::q_box(d);
      kv_box[d] = KvTile::extent(d);
      out_box[d] = L::out_box(d);
    }
    return {{shape_of(GNAFORGE_Q, slice, q_box), shape_of(GNAFORGE_K, slice, kv_box),
             shape_of(GNAFORGE_V, slice, kv_box), shape_of(GNAFORGE_OUT, slice, out_box)}};
  }

  /// What all slices of the call have in common along axis `d`.
  AxisParams axis_params(int d) const {
    const Band band = band_of(axes[d], axes[d].group_of(0), 0);
    return {band.stride, band.first, band.window,    band.begin_min, band.end_min,
            band.ahead,  band.split, band.low_begin, band.low_slack, band.gap};
  }

  /// And what the slice has of its own.
  GroupParams group_params(const Slice& slice, int d) const {
    const std::int64_t group = axes[d].group_of(slice.query[d]);
    const Band band = band_of(axes[d], group, 0);
    const Divisor q_tiles = make_divisor(ceil_div(band.queries, QTile::extent(d)));
    return {band.queries,   band.phase,   band.begin_max, band.end_max, first_key_position(axes[d], group),
            q_tiles.factor, q_tiles.shift};
  }

  /// Q tiles of a slice whose groups are `group`, of all its heads and batch entries.
  std::int64_t q_tiles(const Slice& slice, const GroupParams (&group)[rank]) const {
    std::int64_t tiles = slice.batch * args.problem->heads;
    for (int d = 0; d < rank; ++d) tiles *= ceil_div(group[d].queries, QTile::extent(d));
    return tiles;
  }

  /// Fills in what slices of the call have in common: Params, or what there is of it for each call.
  template <class CallParams>
  void fill_common(CallParams& params) const {
    const gnaforge_problem& problem = *args.problem;
    params.kv_heads = make_divisor(static_cast<int>(problem.kv_heads));
    params.heads_per_kv_head = make_divisor(static_cast<int>(problem.heads / problem.kv_heads));
    params.backwards = 0;
    for (int d = 0; d < rank; ++d) {
      params.axis[d] = axis_params(d);
      if (axes[d].causal != GNAFORGE_CAUSAL_NONE)
        params.backwards = static_cast<decltype(params.backwards)>(params.backwards | 1 << d);
    }
    if (const gnaforge_tensor* const lse = tensor_of(args, GNAFORGE_LSE)) {
      params.lse_batch_stride = lse->batch_stride;
      params.lse_head_stride = lse->head_stride;
      for (int d = 0; d < rank; ++d) params.lse_token_stride[d] = lse->token_stride[d] * axes[d].dilation;
    }
  }

  bool has_sides() const {
    for (int d = 0; d < rank; ++d) {
      const AxisParams axis = axis_params(d);
      if (axis.split != -far_away || axis.gap != 0) return true;
    }
    return false;
  }

 private:
  static const std::int64_t (&first(int role, const Slice& slice))
      [rank] { return role_facts[role].tokens == Tokens::key ? slice.key : slice.query; }

  MapShape shape_of(int role, const Slice& slice, const int (&box)[rank]) const {
    const gnaforge_tensor& tensor = *tensor_of(args, role);
    const Sizes sizes = sizes_of(*args.problem, role);
    Extents<rank> extents{sizes.channels, sizes.heads, {}, slice.batch};
    std::int64_t token_stride[rank];
    for (int d = 0; d < rank; ++d) {
      const std::int64_t tokens = sizes.tokens[d] - first(role, slice)[d], step = axes[d].dilation;
      extents.tokens[d] = step == 1 ? tokens : (tokens + step - 1) / step;
      token_stride[d] = tensor.token_stride[d] * step;
    }
    return map_shape<Element, rank>(role, tensor, data_of(role, slice, Element::bytes), extents, token_stride, box,
                                    folded);
  }
};

/// Encodes the maps of `shapes` that there are, and that `wanted(i)` says.
template <class Element, class Wanted>
gnaforge_code encode_maps(EncodeTiled encode, CUtensorMap* maps, const MapShapes& shapes, const Wanted& wanted,
                          const Reason& reason) {
  for (int i = 0; i < maps_of_set; ++i) {
    if (shapes.map[i].rank == 0 || !wanted(i)) continue;
    if (const CUresult result = encode_map<Element>(encode, maps[i], shapes.map[i]))
      return reason.refuse(GNAFORGE_FAILED, "the driver refuses a tensor map of %s (CUresult %d)",
                           role_facts[shapes.map[i].role].name, static_cast<int>(result));
  }
  return GNAFORGE_OK;
}

/// Whether the driver takes launches that may begin early, also while a stream is captured into a graph: from CUDA
/// 12.3 on (CUDA C++ Programming Guide, Programmatic Dependent Launch, Use in CUDA Graphs).
inline bool driver_begins_early() {
  static std::atomic<int> known{0};
  int version = known.load(std::memory_order_relaxed);
  if (version == 0 && cudaDriverGetVersion(&version) == cudaSuccess) known.store(version, std::memory_order_relaxed);
  return version >= 12030;
}

/// Launches the kernel on Params for what they have.
template <class Config, class L, class Params>
gnaforge_code launch(const Target& target, Params& params, const Reason& reason) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(min_int(params.tiles(), target.processors * L::blocks_per_processor)));
  config.blockDim = dim3(L::threads);
  config.dynamicSmemBytes = L::shared_bytes;
  config.stream = static_cast<cudaStream_t>(target.stream);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  if (L::begins_early && driver_begins_early()) {
    config.attrs = &early;
    config.numAttrs = 1;
  }
  void* arguments[] = {&params};
  const cudaError_t error = cudaLaunchKernelExC(&config, Config::kernel(), arguments);
  if (error == cudaSuccess) return GNAFORGE_OK;
  cudaGetLastError();
  return reason.refuse(GNAFORGE_FAILED, "the launch failed: %s", cudaGetErrorString(error));
}

}  // namespace gnaforge::gpu
