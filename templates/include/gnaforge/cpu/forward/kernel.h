// The cpu forward kernel: its entry, and the choice of instruction set. The kernel's body is compiled once per
// instruction set, each in its own namespace, and the best that the machine has is picked at the first call.
#pragma once

// Everything that the bodies use is included here, before the target changes: an inline function compiled for AVX-512
// may be the copy that the linker keeps for all.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "gnaforge/cpu/forward/plan.h"
#include "gnaforge/cpu/forward/row_set.h"
#include "gnaforge/entry.h"
#include "gnaforge/pattern_counts.h"

#if defined(GNAFORGE_COUNT_TILES)
// What the kernel really did, for tests.
extern "C" {
[[gnu::visibility("default")]] std::atomic<std::int64_t> gnaforge_visited_tiles;
[[gnu::visibility("default")]] std::atomic<std::int64_t> gnaforge_interior_tiles;
}
#endif

// block_rows and block_channels: accumulators of the two products, as many as registers take.
#define GNAFORGE_ISA portable
#define GNAFORGE_VECTOR_BYTES 16
namespace gnaforge::cpu::portable {
#if defined(__aarch64__)
constexpr int block_rows = 8, block_channels = 8;
#else
constexpr int block_rows = 6, block_channels = 4;
#endif
}  // namespace gnaforge::cpu::portable
#include "gnaforge/cpu/forward/isa.h"

#if defined(__x86_64__)

#define GNAFORGE_HAS_F16C

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define GNAFORGE_ISA avx2
#define GNAFORGE_VECTOR_BYTES 32
namespace gnaforge::cpu::avx2 {
constexpr int block_rows = 6, block_channels = 4;
}
#include "gnaforge/cpu/forward/isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define GNAFORGE_ISA avx512
#define GNAFORGE_VECTOR_BYTES 64
namespace gnaforge::cpu::avx512 {
constexpr int block_rows = 8, block_channels = 8;
}
#include "gnaforge/cpu/forward/isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif

namespace gnaforge::cpu {

enum class Isa { portable, avx2, avx512 };

/// The best instruction set of this machine, or a lower one that GNAFORGE_CPU_ISA names.
inline Isa choose_isa() {
  Isa best = Isa::portable;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      best = Isa::avx512;
  }
#endif
  const char* wanted = std::getenv("GNAFORGE_CPU_ISA");
  if (wanted != nullptr && std::strcmp(wanted, "portable") == 0) return Isa::portable;
  if (wanted != nullptr && std::strcmp(wanted, "avx2") == 0) return std::min(best, Isa::avx2);
  return best;
}

template <class Config>
struct Kernel {
  static constexpr int rank = Config::QTile::rank;
  using Body = void (*)(const Plan<Config>&, float*, std::atomic<std::int64_t>&);

  static Body body() {
    static const Body chosen = [] {
      switch (choose_isa()) {
#if defined(__x86_64__)
        case Isa::avx512: return static_cast<Body>(avx512::Forward<Config>::run);
        case Isa::avx2: return static_cast<Body>(avx2::Forward<Config>::run);
#endif
        default: return static_cast<Body>(portable::Forward<Config>::run);
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
  static std::int64_t slots(const gnaforge_args& args, const Plan<Config>& plan) {
    return std::min(threads(args), plan.tasks);
  }

  static std::int64_t workspace_bytes(const gnaforge_args* args) {
    const Plan<Config> plan(*args);
    return slots(*args, plan) * plan.scratch.floats * static_cast<std::int64_t>(sizeof(float));
  }

  static double visited_work(const gnaforge_args* args) {
    PatternAxis axes[rank];
    for (int d = 0; d < rank; ++d) axes[d] = PatternAxis(*args->problem, d);
    // Keys of a KV tile that no query of the Q tile sees are left out, so only those that it sees count.
    constexpr int rows = ceil_div(Config::QTile::volume, row_padding) * row_padding;
    const TileCounts counts = count_tiles<typename Config::QTile, OneKey>(axes);
    double keys = counts.visited;
    for (const std::int64_t tokens : args->problem->extra_tokens) keys += counts.q_tiles * static_cast<double>(tokens);
    return gnaforge::visited_work(*args->problem, keys * rows);
  }

  /// What the threads of one run share.
  struct Shared {
    const Plan<Config>& plan;
    float* workspace;
    std::atomic<std::int64_t> next;
  };

  static void work(std::int64_t begin, std::int64_t end, void* context) {
    auto& shared = *static_cast<Shared*>(context);
    for (std::int64_t slot = begin; slot < end; ++slot)
      body()(shared.plan, shared.workspace + slot * shared.plan.scratch.floats, shared.next);
  }

  static int run(const gnaforge_args* args, void* workspace, void*, char* error, std::size_t n) {
    const Plan<Config> plan(*args);
    if (plan.tasks == 0) return GNAFORGE_OK;
    const Reason reason{error, n};
    if (const gnaforge_code code = check::data(*args, reason)) return code;
    if (const gnaforge_code code = check::workspace(workspace, reason)) return code;
    Shared shared{plan, static_cast<float*>(workspace), {0}};
    const std::int64_t used = slots(*args, plan);
    if (args->host == nullptr || args->host->parallel_for == nullptr || used == 1)
      work(0, used, &shared);
    else
      args->host->parallel_for(0, used, 1, work, &shared);
    return GNAFORGE_OK;
  }

  /// A call of a list.
  struct Queued {
    Plan<Config> plan;
    std::atomic<std::int64_t> next{0};  ///< The first of its tasks that nobody has taken.
    double task_work;

    explicit Queued(const gnaforge_args& args) : plan(args), task_work(plan.task_work()) {}
  };

  static_assert(std::is_trivially_destructible<Queued>::value, "nobody destroys what is in a workspace");

  /// A list of calls in its workspace: their plans, the order of work, and the threads' scratch memory.
  struct List {
    Queued* queued;
    Queued** order;
    std::int64_t count;
    float* scratch;
    std::int64_t floats = 0;  ///< Of one thread's scratch memory.
    std::int64_t slots = 0;   ///< Threads that have something to do.

    /// The longest tasks come first, so that no thread begins one when the others have nothing left.
    List(const gnaforge_args* const* calls, std::int64_t calls_count, void* workspace)
        : queued(static_cast<Queued*>(workspace)),
          order(reinterpret_cast<Queued**>(queued + calls_count)),
          count(calls_count),
          scratch(reinterpret_cast<float*>(static_cast<char*>(workspace) + plan_bytes(count))) {
      std::int64_t tasks = 0;
      for (std::int64_t i = 0; i < count; ++i) {
        order[i] = new (queued + i) Queued(*calls[i]);
        tasks += queued[i].plan.tasks;
        floats = std::max(floats, queued[i].plan.scratch.floats);
      }
      slots = std::min(threads(*calls[0]), tasks);
      std::sort(order, order + count, [](const Queued* a, const Queued* b) {
        return a->task_work != b->task_work ? a->task_work > b->task_work : a < b;
      });
    }

    static std::int64_t plan_bytes(std::int64_t count) {
      return (count * static_cast<std::int64_t>(sizeof(Queued) + sizeof(Queued*)) + 63) / 64 * 64;
    }
  };

  static std::int64_t calls_workspace_bytes(const gnaforge_args* const* calls, std::int64_t count) {
    std::int64_t tasks = 0, floats = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      const Plan<Config> plan(*calls[i]);
      tasks += plan.tasks;
      floats = std::max(floats, plan.scratch.floats);
    }
    const std::int64_t slots = std::min(threads(*calls[0]), tasks);
    return List::plan_bytes(count) + slots * floats * static_cast<std::int64_t>(sizeof(float));
  }

  static void work_on_calls(std::int64_t begin, std::int64_t end, void* context) {
    const List& list = *static_cast<List*>(context);
    for (std::int64_t slot = begin; slot < end; ++slot)
      for (std::int64_t i = 0; i < list.count; ++i) {
        Queued& one = *list.order[i];
        if (one.next.load(std::memory_order_relaxed) < one.plan.tasks)
          body()(one.plan, list.scratch + slot * list.floats, one.next);
      }
  }

  static int run_calls(const gnaforge_args* const* calls, std::int64_t count, void* workspace, void*, char* error,
                       std::size_t n) {
    const Reason reason{error, n};
    if (const gnaforge_code code = check::workspace(workspace, reason)) return code;
    List list(calls, count, workspace);
    for (std::int64_t i = 0; i < count; ++i)
      if (list.queued[i].plan.tasks > 0)
        if (const gnaforge_code code = check::data(*calls[i], reason)) return code;
    const gnaforge_host* const host = calls[0]->host;
    if (host == nullptr || host->parallel_for == nullptr || list.slots <= 1)
      work_on_calls(0, list.slots, &list);
    else
      host->parallel_for(0, list.slots, 1, work_on_calls, &list);
    return GNAFORGE_OK;
  }
};

template <class Config>
constexpr gnaforge_entry make_entry() {
  using K = Kernel<Config>;
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
          K::run,
          K::calls_workspace_bytes,
          K::run_calls};
}

}  // namespace gnaforge::cpu
