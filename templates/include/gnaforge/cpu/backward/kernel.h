// The cpu backward kernels: their entry. The body is compiled once per instruction set; see forward/kernel.h.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

#include "gnaforge/cpu/backward/plan.h"
#include "gnaforge/cpu/backward/related_rows.h"
#include "gnaforge/cpu/instruction_sets.h"
#include "gnaforge/entry.h"
#include "gnaforge/pattern_counts.h"

#define GNAFORGE_ISA portable
#define GNAFORGE_VECTOR_BYTES 16
#include "gnaforge/cpu/backward/isa.h"

#if defined(__x86_64__)

#define GNAFORGE_ISA avx2
#define GNAFORGE_VECTOR_BYTES 32
GNAFORGE_BEGIN_AVX2
#include "gnaforge/cpu/backward/isa.h"
GNAFORGE_END_TARGET

#define GNAFORGE_ISA avx512
#define GNAFORGE_VECTOR_BYTES 64
GNAFORGE_BEGIN_AVX512
#include "gnaforge/cpu/backward/isa.h"
GNAFORGE_END_TARGET

#endif

namespace gnaforge::cpu {

template <class Config>
struct GradientKernel {
  using Plan = GradientPlan<Config>;
  static constexpr int rank = Plan::rank;
  struct Body {
    void (*run)(const Plan&, float*, std::atomic<std::int64_t>&);
    void (*compute_delta)(const Plan&, std::int64_t, std::int64_t);
  };

  static const Body& body() {
    static const Body chosen = [] {
      switch (choose_isa()) {
#if defined(__x86_64__)
        case Isa::avx512: return Body{avx512::Backward<Config>::run, avx512::Backward<Config>::compute_delta};
        case Isa::avx2: return Body{avx2::Backward<Config>::run, avx2::Backward<Config>::compute_delta};
#endif
        default: return Body{portable::Backward<Config>::run, portable::Backward<Config>::compute_delta};
      }
    }();
    return chosen;
  }

  static constexpr Traits traits{Config::op, GNAFORGE_CPU, Config::features};

  static int can_run(const gnaforge_args* args, char* why, std::size_t n) {
    return check_call<Config>(args, traits, Reason{why, n});
  }

  static std::int64_t threads(const gnaforge_args& args) {
    return args.host == nullptr ? 1 : std::max<std::int64_t>(args.host->threads, 1);
  }

  /// Threads that have something to do.
  static std::int64_t slots(const gnaforge_args& args, const Plan& plan) { return std::min(threads(args), plan.tasks); }

  /// Floats in front of the threads' scratch, where delta is the call's own.
  static std::int64_t delta_floats(const gnaforge_args& args, const Plan& plan) {
    return tensor_of(args, GNAFORGE_DELTA) != nullptr ? 0 : (plan.queries() + 63) / 64 * 64;
  }

  static std::int64_t workspace_bytes(const gnaforge_args* args) {
    const Plan plan(*args);
    return (delta_floats(*args, plan) + slots(*args, plan) * plan.scratch.floats) *
           static_cast<std::int64_t>(sizeof(float));
  }

  static double visited_work(const gnaforge_args* args) {
    PatternAxis axes[rank];
    for (int d = 0; d < rank; ++d) axes[d] = PatternAxis(*args->problem, d);
    constexpr int rows = ceil_div(Plan::Tile::volume, row_padding) * row_padding;
    if constexpr (Plan::of_keys) {
      double visited = count_key_tiles<typename Plan::Tile, OneKey>(axes).visited, queries = 1;
      for (int d = 0; d < rank; ++d) queries *= static_cast<double>(args->problem->tokens[d]);
      for (const std::int64_t tokens : args->problem->extra_tokens)
        visited += queries * static_cast<double>((tokens + Plan::Tile::volume - 1) / Plan::Tile::volume);
      return gnaforge::visited_work(*args->problem, visited * rows) * 2;
    } else {
      const TileCounts counts = count_tiles<typename Plan::Tile, OneKey>(axes);
      double visited = counts.visited;
      for (const std::int64_t tokens : args->problem->extra_tokens)
        visited += counts.q_tiles * static_cast<double>(tokens);
      return gnaforge::visited_work(*args->problem, visited * rows) * 1.5;
    }
  }

  /// What the threads of one run share.
  struct Shared {
    const Plan& plan;
    float* scratch;
    std::atomic<std::int64_t> next;
  };

  static void work(std::int64_t begin, std::int64_t end, void* context) {
    auto& shared = *static_cast<Shared*>(context);
    for (std::int64_t slot = begin; slot < end; ++slot)
      body().run(shared.plan, shared.scratch + slot * shared.plan.scratch.floats, shared.next);
  }

  static void compute_delta(std::int64_t begin, std::int64_t end, void* plan) {
    body().compute_delta(*static_cast<const Plan*>(plan), begin, end);
  }

  static void in_parallel(const gnaforge_args& args, std::int64_t end, std::int64_t grain,
                          void (*part)(std::int64_t, std::int64_t, void*), void* context) {
    if (threads(args) == 1 || args.host->parallel_for == nullptr || end <= grain)
      part(0, end, context);
    else
      args.host->parallel_for(0, end, grain, part, context);
  }

  static int run(const gnaforge_args* args, void* workspace, void*, char* error, std::size_t n) {
    Plan plan(*args);
    if (plan.tasks == 0) return GNAFORGE_OK;
    const Reason reason{error, n};
    if (const gnaforge_code code = check::data(*args, reason)) return code;
    if (const gnaforge_code code = check::workspace(workspace, reason)) return code;
    auto* const memory = static_cast<float*>(workspace);
    const std::int64_t in_front = delta_floats(*args, plan);
    if (in_front > 0) plan.place_delta(memory);
    constexpr std::int64_t grain = 1024;  // queries
    if (!plan.delta_is_given) in_parallel(*args, plan.queries(), grain, compute_delta, &plan);
    Shared shared{plan, memory + in_front, {0}};
    in_parallel(*args, slots(*args, plan), 1, work, &shared);
    return GNAFORGE_OK;
  }
};

template <class Config>
constexpr gnaforge_entry make_gradient_entry() {
  using K = GradientKernel<Config>;
  return {sizeof(gnaforge_entry),
          K::traits.op,
          K::traits.features,
          0,
          0,
          GNAFORGE_CPU,
          0,
          Config::key,
          K::can_run,
          K::workspace_bytes,
          K::visited_work,
          K::run};
}

}  // namespace gnaforge::cpu
