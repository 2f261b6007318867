// The entry of a kernel: checks a call, encodes tensor maps, launches. Backward kernels have entries of its parts.
// Host only.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

#include "gnaforge/entry.h"
#include "gnaforge/gpu/maps.h"
#include "gnaforge/gpu/params.h"
#include "gnaforge/pattern_counts.h"

namespace gnaforge::gpu {

// The emulator runs on the caller's memory, so its builds take CPU tensors.
#if defined(GNAFORGE_EMULATED)
constexpr gnaforge_device tensor_device = GNAFORGE_CPU;
#else
constexpr gnaforge_device tensor_device = GNAFORGE_CUDA;
#endif

/// `Config` is as in entry.h, and has:
///   q_tile_heads;                            // query heads that share keys, of which a Q tile has the tokens
///   capabilities[];                          // compute capabilities that it runs on, as 10 * major + minor
///   needs;                                   // how a refusal names them
///   static const void* kernel();             // the kernel as the runtime knows it
/// `L` is what the family makes of it, its Layout:
///   rank, head_dim, value_head_dim;          // of Config, value_head_dim as it is and not 0
///   max_tiles;                               // tiles of one launch, at most
///   rows, columns;                           // of the products for a Q tile and a KV tile, with padding
///   may_fold;                                // whether heads may be folded into the maps' channels; see maps.h
///   begins_early;                            // whether a launch may begin before the kernel before it in its stream
///                                            // ends: every thread block waits for that end (griddepcontrol.wait)
///                                            // before it touches tensors
///   q_box(axis), out_box(axis);              // what one copy loads of Q, and stores of the output
///   threads, shared_bytes;                   // of a thread block
///   blocks_per_processor;                    // that fit a multiprocessor
///
/// `Params_` is what a launch hands to the kernel: LaunchParams, or a struct that begins with it.
template <class Config, class L, class Params_ = Params<L::rank>>
struct Entry {
  using Params = Params_;
  using QTile = typename Config::QTile;
  using KvTile = typename Config::KvTile;
  using Element = gpu::Element<Config::dtype>;
  static constexpr int rank = L::rank;

  static int device_of(const gnaforge_args& args) { return args.device == GNAFORGE_CUDA ? args.device_index : 0; }

  static gnaforge_code check_device(const gnaforge_args& args, const Reason& reason) {
    int major = 0, minor = 0;
    const int device = device_of(args);
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (error != cudaSuccess) {
      cudaGetLastError();  // or the next call of somebody else would report it
      return reason.refuse(GNAFORGE_NO_HARDWARE, "can't ask device %d: %s", device, cudaGetErrorString(error));
    }
    for (const int capability : Config::capabilities)
      if (capability == 10 * major + minor) return GNAFORGE_OK;
    return reason.refuse(GNAFORGE_NO_HARDWARE, "device %d has compute capability %d.%d, this kernel needs %s", device,
                         major, minor, Config::needs);
  }

  static void copy_patterns(const gnaforge_problem& problem, PatternAxis (&axes)[rank]) {
    for (int d = 0; d < rank; ++d) axes[d] = PatternAxis(problem, d);
  }

  static double launch_tiles(const gnaforge_problem& problem, const PatternAxis (&axes)[rank]) {
    double tiles = static_cast<double>(problem.batch) * static_cast<double>(problem.heads / Config::q_tile_heads);
    for (int d = 0; d < rank; ++d)
      tiles *= static_cast<double>(AxisQTiles(query_axis(axes[d]), QTile::extent(d)).count);
    return tiles;
  }

  static constexpr Traits traits{Config::op, tensor_device, Config::features};

  /// `tiles` counts those of `kind` that one launch may have to compute.
  static gnaforge_code check_tiles(const gnaforge_args& args, const char* kind,
                                   double (*tiles)(const gnaforge_problem&, const PatternAxis (&)[rank]),
                                   const Reason& reason) {
    PatternAxis axes[rank];
    copy_patterns(*args.problem, axes);
    const double count = tiles(*args.problem, axes);
    if (count <= L::max_tiles) return GNAFORGE_OK;
    return reason.refuse(GNAFORGE_NO_SIZE, "%.0f %s tiles of all heads and batch entries, at most %d", count, kind,
                         L::max_tiles);
  }

  static int can_run(const gnaforge_args* args, char* why, std::size_t n) {
    const Reason reason{why, n};
    if (const gnaforge_code code = check_call<Config>(args, traits, reason)) return code;
    const gnaforge_problem& problem = *args->problem;
    if (!(problem.scale > 0))
      return reason.refuse(GNAFORGE_NO_SCALE, "scale is %g, this kernel takes positive ones: it masks before it scales",
                           problem.scale);
    for (const std::int64_t tokens : problem.extra_tokens)
      if (tokens > max_axis_length)
        return reason.refuse(GNAFORGE_NO_SIZE, "there are %lld extra keys, at most %d in a piece",
                             static_cast<long long>(tokens), max_axis_length);
    if (problem.kv_heads > 0 && problem.heads / problem.kv_heads % Config::q_tile_heads != 0)
      return reason.refuse(GNAFORGE_NO_OTHER, "%lld query heads share keys, a multiple of %d must",
                           static_cast<long long>(problem.heads / problem.kv_heads), Config::q_tile_heads);
    if (const gnaforge_code code = check::layout(*args, reason)) return code;
    if (const gnaforge_code code = check_tiles(*args, "Q", launch_tiles, reason)) return code;
    return check_device(*args, reason);
  }

  static std::int64_t workspace_bytes(const gnaforge_args*) { return 0; }

  /// Columns of last KV tiles along the first axis that the kernel doesn't compute; see sm100/forward/short_tiles.h.
  template <class Layout, class Short = typename Layout::Short>
  static double spared_columns(const PatternAxis (&axes)[rank], int) {
    double spared = count_spared(axes[0], QTile::extent(0), KvTile::extent(0),
                                 [](int rows) { return L::columns - Short::enough(rows * Short::row); });
    for (int d = 1; d < rank; ++d) spared *= count_axis_tiles(axes[d], QTile::extent(d), KvTile::extent(d)).visited;
    return spared;
  }
  template <class Layout>
  static double spared_columns(const PatternAxis (&)[rank], long) {
    return 0;
  }

  static double visited_work(const gnaforge_args* args) {
    PatternAxis axes[rank];
    copy_patterns(*args->problem, axes);
    const TileCounts counts = count_tiles<QTile, KvTile>(axes);
    double tiles = counts.visited;  // lengths are on the device: all extra keys
    for (const std::int64_t tokens : args->problem->extra_tokens)
      tiles += counts.q_tiles * static_cast<double>((tokens + L::columns - 1) / L::columns);
    const double columns = tiles * L::columns - spared_columns<L>(axes, 0);
    const double scores = columns * L::rows / Config::q_tile_heads;
    return gnaforge::visited_work(*args->problem, scores);
  }

  /// Once per device: the kernel may use more shared memory than kernels get by default.
  static cudaError_t allow_shared_memory(int device) {
    static std::atomic<std::uint64_t> done{0};
    const std::uint64_t bit = std::uint64_t{1} << (device & 63);
    if (device < 64 && (done.load(std::memory_order_relaxed) & bit)) return cudaSuccess;
    const cudaError_t error =
        cudaFuncSetAttribute(Config::kernel(), cudaFuncAttributeMaxDynamicSharedMemorySize, L::shared_bytes);
    if (error == cudaSuccess && device < 64) done.fetch_or(bit, std::memory_order_relaxed);
    return error;
  }

  /// One dilation group, of all batch entries or of one.
  struct Slice {
    std::int64_t query[rank], key[rank];  ///< Its first token in the query and in the key tensor.
    std::int64_t batch_begin, batch;
  };

  /// A launch in the making.
  struct Launch {
    Params params;
    int slices, groups;
  };

  static bool is_of_keys(int role) { return role_facts[role].tokens == Tokens::key; }

  static void* data_of(const gnaforge_args& args, int role, const Slice& slice, std::int64_t size) {
    const gnaforge_tensor& tensor = *tensor_of(args, role);
    std::int64_t offset = slice.batch_begin * tensor.batch_stride;
    for (int d = 0; d < rank; ++d) offset += (is_of_keys(role) ? slice.key : slice.query)[d] * tensor.token_stride[d];
    return static_cast<char*>(tensor.data) + offset * size;
  }

  /// Tokens from `first` on in steps of the dilation.
  static std::int64_t group_tokens(std::int64_t tokens, std::int64_t first, std::int64_t dilation) {
    return dilation == 1 ? tokens - first : (tokens - first + dilation - 1) / dilation;
  }

  static MapShape shape_of(const gnaforge_args& args, int role, bool folded, const PatternAxis (&axes)[rank],
                           const Slice& slice, const int (&box)[rank]) {
    const gnaforge_tensor& tensor = *tensor_of(args, role);
    const Sizes sizes = sizes_of(*args.problem, role);
    const std::int64_t (&first)[rank] = is_of_keys(role) ? slice.key : slice.query;
    Extents<rank> extents{sizes.channels, sizes.heads, {}, slice.batch};
    std::int64_t token_stride[rank];
    for (int d = 0; d < rank; ++d) {
      // A group of keys may have no query: then nobody reads the one that the map needs.
      const std::int64_t tokens = group_tokens(sizes.tokens[d], first[d], axes[d].dilation);
      extents.tokens[d] = tokens > 0 ? tokens : 1;
      token_stride[d] = tensor.token_stride[d] * axes[d].dilation;
    }
    return map_shape<Element, rank>(role, tensor, data_of(args, role, slice, Element::bytes), extents, token_stride,
                                    box, role == GNAFORGE_Q ? Config::q_tile_heads : 1, folded);
  }

  static gnaforge_code map(EncodeTiled encode, CUtensorMap& out, const MapShape& shape, const Reason& reason) {
    const CUresult result = encode_map<Element>(encode, out, shape);
    if (result == CUDA_SUCCESS) return GNAFORGE_OK;
    return reason.refuse(GNAFORGE_FAILED, "the driver refuses a tensor map of %s (CUresult %d)",
                         role_facts[shape.role].name, static_cast<int>(result));
  }

  static gnaforge_code map(EncodeTiled encode, CUtensorMap& out, const gnaforge_args& args, int role, bool folded,
                           const PatternAxis (&axes)[rank], const Slice& slice, const int (&box)[rank],
                           const Reason& reason) {
    return map(encode, out, shape_of(args, role, folded, axes, slice, box), reason);
  }

  /// What all slices of a call have in common.
  static Params common_params(const gnaforge_args& args, const PatternAxis (&axes)[rank], bool folded) {
    const gnaforge_problem& problem = *args.problem;
    Params params{};
    params.folded = folded;
    params.kv_heads = make_divisor(static_cast<int>(problem.kv_heads));
    params.heads_per_kv_head = make_divisor(static_cast<int>(problem.heads / problem.kv_heads) / Config::q_tile_heads);
    params.scale = static_cast<float>(problem.scale);
    params.scale_log2 = static_cast<float>(problem.scale * 1.4426950408889634);
    for (int d = 0; d < rank; ++d)
      if (axes[d].causal != GNAFORGE_CAUSAL_NONE)
        params.backwards = static_cast<std::uint16_t>(params.backwards | 1 << d);
    if (const gnaforge_tensor* const lse = tensor_of(args, GNAFORGE_LSE)) {
      params.lse_batch_stride = lse->batch_stride;
      params.lse_head_stride = lse->head_stride;
      for (int d = 0; d < rank; ++d) params.lse_token_stride[d] = lse->token_stride[d] * axes[d].dilation;
    }
    return params;
  }

  /// The dilation group that a slice is of along axis `d`. Sets what of its band all groups have in common.
  static GroupParams group_of(Params& params, const PatternAxis& axis, const Slice& slice, int d) {
    const std::int64_t group = axis.group_of(slice.query[d]);
    const Band band = band_of(axis, group, 0);
    params.axis[d] = {band.stride, band.first, band.window,    band.begin_min, band.end_min,
                      band.ahead,  band.split, band.low_begin, band.low_slack, band.gap};
    if (band.split != -far_away || band.gap != 0) params.has_sides = 1;
    const Divisor q_tiles = make_divisor(max_int(1, ceil_div(band.queries, QTile::extent(d))));
    return {band.queries,   band.phase,   band.begin_max, band.end_max, first_key_position(axis, group),
            q_tiles.factor, q_tiles.shift};
  }

  /// The number of a group among those of a launch, which learns of it; max_groups if there is no room.
  static int number_of(Launch& launch, const GroupParams& group) {
    for (int i = 0; i < launch.groups; ++i)
      if (launch.params.groups[i] == group) return i;
    if (launch.groups == max_groups) return max_groups;
    launch.params.groups[launch.groups] = group;
    return launch.groups++;
  }

  /// Whether there is room for the slice; it counts from `finish_slice` on.
  static bool place_slice(Launch& launch, const PatternAxis (&axes)[rank], const Slice& slice) {
    if (launch.slices == Params::slices) return false;
    int groups = 0;
    for (int d = 0; d < rank; ++d) {
      const int number = number_of(launch, group_of(launch.params, axes[d], slice, d));
      if (number == max_groups) return false;
      groups |= number << (8 * d);
    }
    launch.params.groups_of[launch.slices] = groups;
    return true;
  }

  static gnaforge_code finish_slice(Launch& launch, const gnaforge_args& args, const PatternAxis (&axes)[rank],
                                    const Slice& slice, EncodeTiled encode, const Reason& reason) {
    Params& params = launch.params;
    const int index = launch.slices;
    std::int64_t tiles = slice.batch * args.problem->heads / Config::q_tile_heads;
    int q_box[rank], kv_box[rank], out_box[rank];
    for (int d = 0; d < rank; ++d) {
      tiles *= ceil_div(params.queries(index, d), QTile::extent(d));
      q_box[d] = L::q_box(d);
      kv_box[d] = KvTile::extent(d);
      out_box[d] = L::out_box(d);
    }
    if (tensor_of(args, GNAFORGE_LSE) != nullptr)
      params.log_sum_exp[index] = static_cast<float*>(data_of(args, GNAFORGE_LSE, slice, sizeof(float)));
    Maps& maps = params.maps[index];
    const struct {
      CUtensorMap& map;
      gnaforge_role role;
      const int (&box)[rank];
    } copied[] = {{maps.q, GNAFORGE_Q, q_box},
                  {maps.k, GNAFORGE_K, kv_box},
                  {maps.v, GNAFORGE_V, kv_box},
                  {maps.out, GNAFORGE_OUT, out_box}};
    for (const auto& [to, role, box] : copied)
      if (const gnaforge_code code = map(encode, to, args, role, params.folded != 0, axes, slice, box, reason))
        return code;
    add_tiles(launch, tiles);
    return GNAFORGE_OK;
  }

  /// The slice is part of the launch from now on.
  static void add_tiles(Launch& launch, std::int64_t tiles) {
    int* const first_tile = launch.params.first_tile;
    const int end = first_tile[launch.slices] + static_cast<int>(tiles);
    for (int next = ++launch.slices; next <= Params::slices; ++next) first_tile[next] = end;
  }

  /// Whether the driver takes launches that may begin early, also while a stream is captured into a graph: from CUDA
  /// 12.3 on (CUDA C++ Programming Guide, Programmatic Dependent Launch, Use in CUDA Graphs).
  static bool driver_begins_early() {
    static std::atomic<int> known{0};
    int version = known.load(std::memory_order_relaxed);
    if (version == 0 && cudaDriverGetVersion(&version) == cudaSuccess) known.store(version, std::memory_order_relaxed);
    return version >= 12030;
  }

  static gnaforge_code run_launch(Launch& made, int processors, void* stream, const Reason& reason) {
    made.slices = made.groups = 0;
    return launch_kernel(made.params, processors, stream, reason);
  }

  /// On what the kernel takes.
  template <class KernelParams>
  static gnaforge_code launch_kernel(KernelParams& params, int processors, void* stream, const Reason& reason) {
    cudaLaunchConfig_t launch{};
    launch.gridDim = dim3(static_cast<unsigned>(min_int(params.tiles(), processors * L::blocks_per_processor)));
    launch.blockDim = dim3(L::threads);
    launch.dynamicSmemBytes = L::shared_bytes;
    launch.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    if (L::begins_early && driver_begins_early()) {
      launch.attrs = &early;
      launch.numAttrs = 1;
    }
    void* arguments[] = {&params};
    const cudaError_t error = cudaLaunchKernelExC(&launch, Config::kernel(), arguments);
    if (error == cudaSuccess) return GNAFORGE_OK;
    cudaGetLastError();
    return reason.refuse(GNAFORGE_FAILED, "the launch failed: %s", cudaGetErrorString(error));
  }

  /// What launches take to know of the machine.
  struct Machine {
    EncodeTiled encode;
    int processors;
  };

  static gnaforge_code find_machine(const gnaforge_args& args, Machine& machine, const Reason& reason) {
    machine.encode = find_encode_tiled();
    if (machine.encode == nullptr)
      return reason.refuse(GNAFORGE_FAILED, "the driver has no cuTensorMapEncodeTiled: it is older than CUDA 12");
    const int device = device_of(args);
    cudaError_t error = cudaDeviceGetAttribute(&machine.processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) error = allow_shared_memory(device);
    if (error == cudaSuccess) return GNAFORGE_OK;
    cudaGetLastError();
    return reason.refuse(GNAFORGE_FAILED, "can't prepare device %d: %s", device, cudaGetErrorString(error));
  }

  /// How batch entries share maps; see maps.h.
  struct Batching {
    bool folded;
    std::int64_t step;  ///< Batch entries of one slice.
  };

  static Batching batching_of(const gnaforge_args& args) {
    const std::int64_t batch = args.problem->batch;
    const bool apart = batch > 1 && repeats_batch(args);
    const bool folded = rank == 3 && L::may_fold && batch > 1 && !apart && foldable<Element>(args);
    return {folded, (rank == 3 && !folded) || apart ? 1 : batch};
  }

  /// Calls `add(slice)` for the slices of all dilation groups that have a query; ends when it returns an error.
  template <class Add>
  static gnaforge_code for_each_slice(const gnaforge_args& args, const PatternAxis (&axes)[rank],
                                      std::int64_t batch_step, const Add& add) {
    Slice slice{};
    slice.batch = batch_step;
    for (;;) {
      for (int d = 0; d < rank; ++d) slice.key[d] = axes[d].first_key(axes[d].group_of(slice.query[d]));
      for (slice.batch_begin = 0; slice.batch_begin < args.problem->batch; slice.batch_begin += batch_step)
        if (const gnaforge_code code = add(slice)) return code;
      int d = rank - 1;
      while (d >= 0 && ++slice.query[d] == (axes[d].dilation < axes[d].q_tokens ? axes[d].dilation : axes[d].q_tokens))
        slice.query[d--] = 0;
      if (d < 0) return GNAFORGE_OK;
    }
  }

  static gnaforge_code run_slices(const gnaforge_args& args, const PatternAxis (&axes)[rank], void* stream,
                                  const Reason& reason) {
    Machine machine{};
    if (const gnaforge_code code = find_machine(args, machine, reason)) return code;
    const Batching batching = batching_of(args);
    Launch launch{common_params(args, axes, batching.folded), 0, 0};
    const auto add = [&](const Slice& slice) -> gnaforge_code {
      if (!place_slice(launch, axes, slice)) {
        if (const gnaforge_code code = run_launch(launch, machine.processors, stream, reason)) return code;
        place_slice(launch, axes, slice);  // of an empty launch
      }
      return finish_slice(launch, args, axes, slice, machine.encode, reason);
    };
    if (const gnaforge_code code = for_each_slice(args, axes, batching.step, add)) return code;
    return run_launch(launch, machine.processors, stream, reason);
  }

  static int run(const gnaforge_args* args, void*, void* stream, char* error, std::size_t n) {
    const Reason reason{error, n};
    if (args->problem->batch == 0 || args->problem->heads == 0) return GNAFORGE_OK;
    if (const gnaforge_code code = gnaforge::check::data(*args, reason)) return code;
    PatternAxis axes[rank];
    copy_patterns(*args->problem, axes);
    return run_slices(*args, axes, stream, reason);
  }

  // Calls are run one by one.
  static constexpr decltype(gnaforge_entry::calls_workspace_bytes) calls_workspace_bytes = nullptr;
  static constexpr decltype(gnaforge_entry::run_calls) run_calls = nullptr;
};

template <class Config, class L, class E = Entry<Config, L>>
constexpr gnaforge_entry make_entry() {
  return {sizeof(gnaforge_entry),
          static_cast<std::uint32_t>(E::traits.op),
          E::traits.features,
          L::threads,
          L::shared_bytes,
          GNAFORGE_CUDA,
          0,
          Config::key,
          E::can_run,
          E::workspace_bytes,
          E::visited_work,
          E::run,
          E::calls_workspace_bytes,
          E::run_calls};
}

}  // namespace gnaforge::gpu
