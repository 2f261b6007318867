// How a process that loaded emulated kernels drives them: schedules, memory, and what happened. Not a part of CUDA.
#include "state.h"

using gnaforge::standin::State;
using Lock = std::lock_guard<std::recursive_mutex>;

namespace {
thread_local std::string text;
}

/// Starts anew under another schedule: a failed kernel does no harm any more. Grid, block and shared memory are
/// ignored.
GNAFORGE_EXPORT void gnaforge_standin_reset(const GnaforgeEmulatorLaunch* schedule) {
  State& state = State::get();
  Lock lock(state.mutex);
  state.settings.launch = *schedule;
  state.reset();
}

/// Memory of the caller that kernels may touch, besides what cudaMalloc gave.
GNAFORGE_EXPORT void gnaforge_standin_announce(uint64_t address, uint64_t size, const char* name) {
  State& state = State::get();
  Lock lock(state.mutex);
  gnaforge_emulator_memory_add(state.ranges, address, size, name);
}

GNAFORGE_EXPORT void gnaforge_standin_withdraw(uint64_t address) {
  State& state = State::get();
  Lock lock(state.mutex);
  gnaforge_emulator_memory_remove(state.ranges, address);
}

/// Messages and launches since the last reset, as JSON; valid until this thread's next call.
GNAFORGE_EXPORT const char* gnaforge_standin_report() {
  State& state = State::get();
  Lock lock(state.mutex);
  text = state.report();
  return text.c_str();
}
