// The entry of a forward kernel that takes Params: checks calls, and has them launched. Host only.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

#include "gnaforge/entry.h"
#include "gnaforge/gpu/launches.h"
#include "gnaforge/pattern_counts.h"

namespace gnaforge::gpu {

// The emulator runs on the caller's memory, so its builds take CPU tensors.
#if defined(GNAFORGE_EMULATED)
constexpr gnaforge_device tensor_device = GNAFORGE_CPU;
#else
constexpr gnaforge_device tensor_device = GNAFORGE_CUDA;
#endif

/// `Config` is as in entry.h, and has:
///   capabilities[];                          // compute capabilities that it runs on, as 10 * major + minor
///   needs;                                   // how a refusal names them
///   static const void* kernel();             // the kernel as the runtime knows it
/// `L` is what the family makes of it, its Layout:
///   rank, head_dim, value_head_dim;          // of Config, value_head_dim as it is and not 0
///   max_tiles;                               // Q tiles of one launch, at most
///   rows, columns;                           // of the products for a Q tile and a KV tile, with padding
///   may_fold;                                // whether heads may be folded into the maps' channels; see maps.h
///   begins_early;                            // whether a launch may begin before the kernel before it in its stream
///                                            // ends: every thread block waits for that end (griddepcontrol.wait)
///                                            // before it touches tensors
///   q_box(axis), out_box(axis);              // what one copy loads of Q, and stores of the output
///   threads, shared_bytes;                   // of a thread block
///   blocks_per_processor;                    // that fit a multiprocessor
/// `Launches` makes launches of calls, as gpu/launches.h does.
template <class Config, class L, class Launches>
struct Entry {
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
    double tiles = static_cast<double>(problem.batch) * static_cast<double>(problem.heads);
    for (int d = 0; d < rank; ++d)
      tiles *= static_cast<double>(AxisQTiles(query_axis(axes[d]), QTile::extent(d)).count);
    return tiles;
  }

  static constexpr Traits traits{Config::op, tensor_device, Config::features};

  static int can_run(const gnaforge_args* args, char* why, std::size_t n) {
    const Reason reason{why, n};
    if (const gnaforge_code code = check_call<Config>(args, traits, reason)) return code;
    const gnaforge_problem& problem = *args->problem;
    if (!(problem.scale > 0))
      return reason.refuse(GNAFORGE_NO_SCALE,
                           "scale is %g, this kernel takes positive ones: it maximises before it scales",
                           problem.scale);
    for (const std::int64_t tokens : problem.extra_tokens)
      if (tokens > max_axis_length)
        return reason.refuse(GNAFORGE_NO_SIZE, "there are %lld extra keys, at most %d in a piece",
                             static_cast<long long>(tokens), max_axis_length);
    if (const gnaforge_code code = check::layout<Element>(*args, reason)) return code;
    PatternAxis axes[rank];
    copy_patterns(problem, axes);
    if (launch_tiles(problem, axes) > L::max_tiles)
      return reason.refuse(GNAFORGE_NO_SIZE, "%.0f Q tiles of all heads and batch entries, at most %d",
                           launch_tiles(problem, axes), L::max_tiles);
    return check_device(*args, reason);
  }

  static std::int64_t workspace_bytes(const gnaforge_args*) { return 0; }

  static double visited_work(const gnaforge_args* args) {
    PatternAxis axes[rank];
    copy_patterns(*args->problem, axes);
    const TileCounts counts = count_tiles<QTile, KvTile>(axes);
    double tiles = counts.visited;  // lengths are on the device: all extra keys
    for (const std::int64_t tokens : args->problem->extra_tokens)
      tiles += counts.q_tiles * static_cast<double>((tokens + L::columns - 1) / L::columns);
    const double scores = tiles * L::rows * L::columns;
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

  static gnaforge_code run_list(const gnaforge_args* const* calls, std::int64_t count, void* stream,
                                const Reason& reason) {
    const EncodeTiled encode = find_encode_tiled();
    if (encode == nullptr)
      return reason.refuse(GNAFORGE_FAILED, "the driver has no cuTensorMapEncodeTiled: it is older than CUDA 12");
    const int device = device_of(*calls[0]);
    int processors = 0;
    cudaError_t error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) error = allow_shared_memory(device);
    if (error != cudaSuccess) {
      cudaGetLastError();
      return reason.refuse(GNAFORGE_FAILED, "can't prepare device %d: %s", device, cudaGetErrorString(error));
    }
    Launches launches({encode, processors, stream}, count > 1, reason);
    for (std::int64_t i = 0; i < count; ++i) {
      if (calls[i]->problem->batch == 0 || calls[i]->problem->heads == 0) continue;
      if (const gnaforge_code code = launches.add(*calls[i])) return code;
    }
    return launches.finish();
  }

  static int run(const gnaforge_args* args, void* workspace, void* stream, char* error, std::size_t n) {
    return run_calls(&args, 1, workspace, stream, error, n);
  }

  static std::int64_t calls_workspace_bytes(const gnaforge_args* const*, std::int64_t) { return 0; }

  static int run_calls(const gnaforge_args* const* calls, std::int64_t count, void*, void* stream, char* error,
                       std::size_t n) {
    const Reason reason{error, n};
    bool any = false;
    for (std::int64_t i = 0; i < count; ++i) {
      if (calls[i]->problem->batch == 0 || calls[i]->problem->heads == 0) continue;
      if (const gnaforge_code code = gnaforge::check::data(*calls[i], reason)) return code;
      any = true;
    }
    return any ? run_list(calls, count, stream, reason) : GNAFORGE_OK;
  }
};

template <class Config, class L, template <class, class> class Launches = gpu::Launches>
constexpr gnaforge_entry make_entry() {
  using Made = Launches<Config, L>;
  using E = Entry<Config, L, Made>;
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
          Made::takes_lists ? E::calls_workspace_bytes : nullptr,
          Made::takes_lists ? E::run_calls : nullptr};
}

}  // namespace gnaforge::gpu
