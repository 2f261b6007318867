// The entry of the backward kernels: launches what computes delta, and then what computes gradients. Both ops share it:
// backward_q goes through dilation groups of queries and their Q tiles, backward_kv through groups of keys and their KV
// tiles. Host only.
#pragma once

#include <type_traits>

#include "gnaforge/gpu/host.h"
#include "gnaforge/sm90/backward/delta.h"
#include "gnaforge/sm90/backward/params.h"
#include "gnaforge/sm90/extra_host.h"

namespace gnaforge::sm90::backward {

/// `L` is as in gpu/host.h, with grad_box(axis) in place of out_box: what one copy stores of a gradient; of its q_box
/// copies of the output's gradient are made, too. `DeltaKernel` says what computes delta, `SumsKernel` what adds up the
/// gradients of extra keys.
template <class Config, class L, const void* (*DeltaKernel)(), const void* (*SumsKernel)()>
struct Entry : gpu::Entry<Config, L, Params<L::rank>> {
  using Base = gpu::Entry<Config, L, Params<L::rank>>;
  using typename Base::Element;
  using typename Base::KvTile;
  using typename Base::Launch;
  using typename Base::Machine;
  using typename Base::Slice;
  static constexpr int rank = L::rank;
  static constexpr bool of_keys = Config::op == GNAFORGE_GNA_BACKWARD_KV;
  static constexpr int results = of_keys ? 2 : 1;
  static constexpr gnaforge_role result_roles[] = {of_keys ? GNAFORGE_GRAD_K : GNAFORGE_GRAD_Q, GNAFORGE_GRAD_V};

  static double kv_tiles(const gnaforge_problem& problem, const PatternAxis (&axes)[rank]) {
    double tiles = static_cast<double>(problem.batch) * static_cast<double>(problem.kv_heads);
    for (int d = 0; d < rank; ++d) tiles *= static_cast<double>(AxisQTiles(key_axis(axes[d]), KvTile::extent(d)).count);
    return tiles + extra_tiles(problem);
  }

  static bool has_extra_keys(const gnaforge_problem& problem) {
    return problem.extra_tokens[0] + problem.extra_tokens[1] > 0;
  }

  /// A part of a tile of extra keys has so many Q tiles at least: a part's sums take as long to write and to add up as
  /// a few. And there are parts of all tiles for each multiprocessor that there may be, not for each that there is:
  /// results don't depend on the device.
  static constexpr int least_steps = 16, most_tasks = 256;

  /// That a tile of extra keys visits of one query head.
  static double all_q_tiles(const gnaforge_problem& problem) {
    double tiles = 1;
    for (int d = 0; d < rank; ++d)
      tiles *= static_cast<double>((problem.tokens[d] + Config::QTile::extent(d) - 1) / Config::QTile::extent(d));
    return tiles;
  }

  static ExtraWork extra_work_of(const gnaforge_problem& problem, float* sums) {
    ExtraWork work{};
    int tiles[GNAFORGE_MAX_EXTRA];
    for (int piece = 0; piece < GNAFORGE_MAX_EXTRA; ++piece)
      tiles[piece] = ceil_div(static_cast<int>(problem.extra_tokens[piece]), KvTile::volume);
    const int steps = static_cast<int>(all_q_tiles(problem)) * static_cast<int>(problem.heads / problem.kv_heads);
    const double tasks =
        static_cast<double>(tiles[0] + tiles[1]) * static_cast<double>(problem.batch * problem.kv_heads);
    const int wanted = tasks == 0 || tasks >= most_tasks ? 1 : ceil_div(most_tasks, static_cast<int>(tasks));
    const int parts = max_int(1, min_int(wanted, steps / least_steps));
    work.sums = sums;
    work.tiles = make_divisor(max_int(1, tiles[0] + tiles[1]));
    work.second = tiles[0];
    work.steps = ceil_div(steps, parts);
    work.parts = make_divisor(ceil_div(steps, work.steps));
    return work;
  }

  /// In parts.
  static double extra_tiles(const gnaforge_problem& problem) {
    if (!of_keys || !has_extra_keys(problem) || problem.batch == 0 || problem.heads == 0) return 0;
    const ExtraWork work = extra_work_of(problem, nullptr);
    return static_cast<double>(problem.batch) * static_cast<double>(problem.kv_heads) * work.parts.value *
           work.tiles.value;
  }

  /// Of one batch entry.
  static double delta_rows(const gnaforge_problem& problem) {
    auto rows = static_cast<double>(problem.heads);
    for (int d = 0; d < rank; ++d) rows *= static_cast<double>(problem.tokens[d]);
    return rows;
  }

  static int can_run(const gnaforge_args* args, char* why, std::size_t n) {
    if (const int code = Base::can_run(args, why, n)) return code;
    const Reason reason{why, n};
    constexpr int most_rows = max_axis_length;
    if (computes_delta(*args) && delta_rows(*args->problem) > most_rows)
      return reason.refuse(GNAFORGE_NO_SIZE, "%.0f queries of all heads in a batch entry, at most %d",
                           delta_rows(*args->problem), most_rows);
    return of_keys ? Base::check_tiles(*args, "KV", kv_tiles, reason) : GNAFORGE_OK;
  }

  /// Whether delta is to be computed: else it is an input.
  static bool computes_delta(const gnaforge_args& args) { return !(args.features & GNAFORGE_FEATURE_DELTA); }

  /// Where the call has delta itself, there are none.
  static std::int64_t delta_bytes(const gnaforge_args* args) {
    if (tensor_of(*args, GNAFORGE_DELTA) != nullptr) return 0;
    const double rows = static_cast<double>(args->problem->batch) * delta_rows(*args->problem);
    return (static_cast<std::int64_t>(rows) * static_cast<std::int64_t>(sizeof(float)) + 255) / 256 * 256;
  }

  /// Delta, and behind it what parts give of extra keys' gradients.
  static std::int64_t workspace_bytes(const gnaforge_args* args) {
    constexpr std::int64_t tile_bytes = KvTile::volume * (L::head_dim + L::value_head_dim) * sizeof(float);
    return delta_bytes(args) + static_cast<std::int64_t>(extra_tiles(*args->problem)) * tile_bytes;
  }

  /// The forward kernel has a product along the channels of Q, and one along those of V.
  static double visited_work(const gnaforge_args* args) {
    if constexpr (of_keys) {
      PatternAxis axes[rank];
      Base::copy_patterns(*args->problem, axes);
      double visited = count_key_tiles<KvTile, typename Config::QTile>(axes).visited;
      for (const std::int64_t tokens : args->problem->extra_tokens)
        visited += all_q_tiles(*args->problem) * static_cast<double>((tokens + KvTile::volume - 1) / KvTile::volume);
      return 2 * gnaforge::visited_work(*args->problem, visited * L::rows * L::columns);
    }
    return 1.5 * Base::visited_work(args);
  }

  /// Delta where the call has it, else in the workspace, which then is as long as its rows are.
  static gnaforge_tensor delta_of(const gnaforge_args& args, void* workspace) {
    if (const gnaforge_tensor* const own = tensor_of(args, GNAFORGE_DELTA)) return *own;
    gnaforge_tensor delta{};
    delta.data = workspace;
    delta.head_stride = 1;
    std::int64_t stride = args.problem->heads;
    for (int d = rank - 1; d >= 0; --d) {
      delta.token_stride[d] = stride;
      stride *= args.problem->tokens[d];
    }
    delta.batch_stride = stride;
    return delta;
  }

  static typename DeltaParams<rank>::View view_of(const gnaforge_tensor* tensor) {
    typename DeltaParams<rank>::View view{};
    if (tensor == nullptr) return view;
    view.data = tensor->data;
    view.batch_stride = tensor->batch_stride;
    view.head_stride = tensor->head_stride;
    for (int d = 0; d < rank; ++d) view.token_stride[d] = tensor->token_stride[d];
    return view;
  }

  static gnaforge_code launch_delta(const gnaforge_args& args, const gnaforge_tensor& delta, int processors,
                                    void* stream, const Reason& reason) {
    const gnaforge_problem& problem = *args.problem;
    DeltaParams<rank> params{};
    params.out = view_of(tensor_of(args, GNAFORGE_OUT));
    params.grad_out = view_of(tensor_of(args, GNAFORGE_GRAD_OUT));
    params.grad_log_sum_exp = view_of(tensor_of(args, GNAFORGE_GRAD_LSE));
    params.delta = view_of(&delta);
    params.heads = make_divisor(static_cast<int>(problem.heads));
    for (int d = 0; d < rank; ++d) params.tokens[d] = make_divisor(static_cast<int>(problem.tokens[d]));
    params.rows = static_cast<int>(delta_rows(problem));
    params.batch = static_cast<int>(problem.batch);
    constexpr int blocks_per_processor = 2048 / delta_threads;
    const int most = processors * blocks_per_processor;
    const int along = min_int(ceil_div(params.rows, DeltaLanes<L::value_head_dim>::rows_per_block), most);
    const dim3 grid(along, min_int(params.batch, ceil_div(most, along)));
    return launch_aside(DeltaKernel(), grid, delta_threads, &params, stream, "computes delta", reason);
  }

  static gnaforge_code launch_sums(const gnaforge_args& args, const ExtraWork& work, int processors, void* stream,
                                   const Reason& reason) {
    SumParams params{};
    params.keys = extra_keys_of(args);
    params.work = work;
    params.batch = static_cast<int>(args.problem->batch);
    params.kv_heads = make_divisor(static_cast<int>(args.problem->kv_heads));
    for (int i = 0; i < 2 * GNAFORGE_MAX_EXTRA; ++i) {
      const int piece = i / 2, role = (i % 2 == 0 ? GNAFORGE_GRAD_EXTRA_K : GNAFORGE_GRAD_EXTRA_V) + piece;
      const gnaforge_tensor* const grad = tensor_of(args, role);
      if (grad == nullptr) continue;
      params.grad[piece][i % 2] = {grad->data, grad->batch_stride, grad->head_stride, grad->token_stride[0]};
      if (args.accumulate & bit(role)) params.accumulates |= 1 << i;
    }
    const int most = processors * (2048 / sum_threads), keys = max_int(params.keys.tokens[0], params.keys.tokens[1]);
    const int along = min_int(ceil_div(keys, sum_warps), most), rows = params.batch * params.kv_heads.value;
    const dim3 grid(along, min_int(rows, ceil_div(most, along)), params.keys.pieces);
    return launch_aside(SumsKernel(), grid, sum_threads, &params, stream, "adds up gradients of extra keys", reason);
  }

  /// A kernel that prepares for the others or finishes what they did, of plain blocks.
  static gnaforge_code launch_aside(const void* kernel, dim3 grid, unsigned threads, void* params, void* stream,
                                    const char* purpose, const Reason& reason) {
    const cudaError_t error =
        cudaLaunchKernel(kernel, grid, dim3(threads), &params, 0, static_cast<cudaStream_t>(stream));
    if (error == cudaSuccess) return GNAFORGE_OK;
    cudaGetLastError();
    return reason.refuse(GNAFORGE_FAILED, "the launch that %s failed: %s", purpose, cudaGetErrorString(error));
  }

  static Params<rank> common_params(const gnaforge_args& args, const PatternAxis (&axes)[rank],
                                    const gnaforge_tensor& delta, bool folded) {
    Params<rank> params = Base::common_params(args, axes, folded);
    params.delta_batch_stride = delta.batch_stride;
    params.delta_head_stride = delta.head_stride;
    for (int d = 0; d < rank; ++d) params.delta_token_stride[d] = delta.token_stride[d] * axes[d].dilation;
    params.extra_keys = extra_keys_of(args);
    for (int i = 0; i < results; ++i)
      if (args.accumulate & bit(result_roles[i])) params.accumulates |= 1 << i;
    return params;
  }

  /// Where they are in all launches that need them.
  static gnaforge_code map_extra_keys(Params<rank>& params, const gnaforge_args& args, const Machine& machine,
                                      const Reason& reason) {
    gpu::MapShape shapes[maps_of_extra]{};
    if (!shape_extra_keys<Element>(shapes, args, KvTile::volume)) return GNAFORGE_OK;
    auto* const maps = reinterpret_cast<CUtensorMap*>(&params.maps[max_slices - 1]);
    for (int i = 0; i < maps_of_extra; ++i)
      if (shapes[i].rank != 0)
        if (const gnaforge_code code = Base::map(machine.encode, maps[i], shapes[i], reason)) return code;
    return GNAFORGE_OK;
  }

  /// What launches work on: tiles of queries or keys of the grid, and of extra keys.
  struct Share {
    bool grid, extra;
  };

  static gnaforge_code finish_slice(Launch& launch, const gnaforge_args& args, const PatternAxis (&axes)[rank],
                                    const Slice& slice, const gnaforge_tensor& delta, Share share,
                                    const Machine& machine, const Reason& reason) {
    Params<rank>& params = launch.params;
    const int index = launch.slices;
    std::int64_t tiles = slice.batch * (of_keys ? args.problem->kv_heads : args.problem->heads);
    const ExtraWork& work = params.extra_work;
    params.extra_tiles[index] =
        of_keys && share.extra ? static_cast<int>(tiles) * work.parts.value * work.tiles.value : 0;
    std::int64_t first_delta = slice.batch_begin * delta.batch_stride;
    int q_box[rank], kv_box[rank], grad_box[rank];
    for (int d = 0; d < rank; ++d) {
      const std::int64_t keys = Base::group_tokens(axes[d].kv_tokens, slice.key[d], axes[d].dilation);
      params.keys[index][d] = static_cast<int>(keys);
      params.kv_tiles[index][d] = make_divisor(max_int(1, ceil_div(params.keys[index][d], KvTile::extent(d))));
      tiles *= of_keys ? params.kv_tiles[index][d].value : ceil_div(params.queries(index, d), Config::QTile::extent(d));
      first_delta += slice.query[d] * delta.token_stride[d];
      q_box[d] = L::q_box(d);
      kv_box[d] = KvTile::extent(d);
      grad_box[d] = L::grad_box(d);
    }
    params.first_batches[index] = static_cast<int>(slice.batch_begin);
    params.log_sum_exp[index] = static_cast<float*>(Base::data_of(args, GNAFORGE_LSE, slice, sizeof(float)));
    params.delta[index] = static_cast<const float*>(delta.data) + first_delta;
    Maps& maps = params.maps[index];
    const struct {
      CUtensorMap& map;
      gnaforge_role role;
      const int (&box)[rank];
    } copied[] = {{maps.q, GNAFORGE_Q, q_box},
                  {maps.k, GNAFORGE_K, kv_box},
                  {maps.v, GNAFORGE_V, kv_box},
                  {maps.grad_out, GNAFORGE_GRAD_OUT, q_box},
                  {maps.grad[0], result_roles[0], grad_box},
                  {maps.grad[1], result_roles[1], grad_box}};
    for (int i = 0; i < 4 + results; ++i)
      if (const gnaforge_code code = Base::map(machine.encode, copied[i].map, args, copied[i].role, params.folded != 0,
                                               axes, slice, copied[i].box, reason))
        return code;
    Base::add_tiles(launch, (share.grid ? tiles : 0) + params.extra_tiles[index]);
    return GNAFORGE_OK;
  }

  /// Tokens of which each begins a dilation group that has something to compute.
  static std::int64_t group_count(const PatternAxis& axis) {
    const std::int64_t tokens = of_keys ? axis.kv_tokens : axis.q_tokens;
    return axis.dilation < tokens ? axis.dilation : tokens;
  }

  static gnaforge_code run_slices(const gnaforge_args& args, const PatternAxis (&axes)[rank],
                                  const gnaforge_tensor& delta, const ExtraWork& work, Share share,
                                  const Machine& machine, void* stream, const Reason& reason) {
    const typename Base::Batching batching = Base::batching_of(args);
    Launch launch{common_params(args, axes, delta, batching.folded), 0, 0};
    launch.params.extra_work = work;
    if (share.extra)
      if (const gnaforge_code code = map_extra_keys(launch.params, args, machine, reason)) return code;
    Slice slice{};
    slice.batch = batching.step;
    auto& first = of_keys ? slice.key : slice.query;
    for (;;) {
      for (int d = 0; d < rank; ++d) {
        if (of_keys)
          slice.query[d] = axes[d].first_query(axes[d].group_of_key(first[d]));
        else
          slice.key[d] = axes[d].first_key(axes[d].group_of(first[d]));
      }
      for (slice.batch_begin = 0; slice.batch_begin < args.problem->batch; slice.batch_begin += batching.step) {
        const bool full = launch.slices + share.extra == max_slices;
        if (full || !Base::place_slice(launch, axes, slice)) {
          if (const gnaforge_code code = Base::run_launch(launch, machine.processors, stream, reason)) return code;
          Base::place_slice(launch, axes, slice);  // of an empty launch
        }
        if (const gnaforge_code code = finish_slice(launch, args, axes, slice, delta, share, machine, reason))
          return code;
      }
      int d = rank - 1;
      while (d >= 0 && ++first[d] == group_count(axes[d])) first[d--] = 0;
      if (d < 0) return Base::run_launch(launch, machine.processors, stream, reason);
    }
  }

  /// Extra keys first, which take longest: in one launch with the others or, where slices don't have all queries, in
  /// ones of their own, as if every query saw every key.
  static gnaforge_code run_with_extra(const gnaforge_args& args, const PatternAxis (&axes)[rank],
                                      const gnaforge_tensor& delta, void* sums, const Machine& machine, void* stream,
                                      const Reason& reason) {
    const ExtraWork work = extra_work_of(*args.problem, static_cast<float*>(sums));
    bool whole = true;
    PatternAxis dense[rank];
    for (int d = 0; d < rank; ++d) {
      whole = whole && axes[d].dilation == 1;
      dense[d] = {};
      dense[d].length = dense[d].window = dense[d].kv_tokens = axes[d].kv_tokens;
      dense[d].q_tokens = axes[d].q_tokens;
      dense[d].stride = dense[d].dilation = 1;
    }
    if (!whole)
      if (const gnaforge_code code = run_slices(args, dense, delta, work, {false, true}, machine, stream, reason))
        return code;
    if (const gnaforge_code code = run_slices(args, axes, delta, work, {true, whole}, machine, stream, reason))
      return code;
    return launch_sums(args, work, machine.processors, stream, reason);
  }

  static int run(const gnaforge_args* args, void* workspace, void* stream, char* error, std::size_t n) {
    const Reason reason{error, n};
    if (args->problem->batch == 0 || args->problem->heads == 0) return GNAFORGE_OK;
    if (const gnaforge_code code = gnaforge::check::data(*args, reason)) return code;
    if (workspace_bytes(args) > 0)
      if (const gnaforge_code code = gnaforge::check::workspace(workspace, reason)) return code;
    Machine machine{};
    if (const gnaforge_code code = Base::find_machine(*args, machine, reason)) return code;
    const gnaforge_tensor delta = delta_of(*args, workspace);
    if (computes_delta(*args))
      if (const gnaforge_code code = launch_delta(*args, delta, machine.processors, stream, reason)) return code;
    PatternAxis axes[rank];
    Base::copy_patterns(*args->problem, axes);
    const bool has_extra = has_extra_keys(*args->problem);
    if (!of_keys || !has_extra) return run_slices(*args, axes, delta, {}, {true, has_extra}, machine, stream, reason);
    return run_with_extra(*args, axes, delta, static_cast<char*>(workspace) + delta_bytes(args), machine, stream,
                          reason);
  }
};

template <class Config, class L, const void* (*DeltaKernel)(), const void* (*SumsKernel)()>
constexpr gnaforge_entry make_entry() {
  return gpu::make_entry<Config, L, Entry<Config, L, DeltaKernel, SumsKernel>>();
}

}  // namespace gnaforge::sm90::backward
