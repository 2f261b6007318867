#include "launch.h"

#include <atomic>
#include <thread>

namespace gnaforge::emulator {

namespace {

void check(const Launch& launch) {
  const Function& f = *launch.function;
  const uint32_t limits[2][3] = {{2147483647, 65535, 65535}, {1024, 1024, 64}};
  for (int i = 0; i < 3; ++i) {
    if (launch.grid[i] < 1 || launch.grid[i] > limits[0][i])
      throw EmulationError("the grid's size " + std::to_string(launch.grid[i]) + " is out of range");
    if (launch.block[i] < 1 || launch.block[i] > limits[1][i])
      throw EmulationError("the block's size " + std::to_string(launch.block[i]) + " is out of range");
    if (f.required_threads[0] && static_cast<uint32_t>(f.required_threads[i]) != launch.block[i])
      throw EmulationError(f.name + " requires another block size (.reqntid)");
  }
  if (launch.threads() > 1024)
    throw EmulationError("a block of " + std::to_string(launch.threads()) + " threads exceeds 1024");
  uint32_t shared = f.needs.dynamic_shared - kSharedStart + launch.dynamic_shared;
  if (shared > kMaxShared)
    throw EmulationError(std::to_string(shared) + " bytes of shared memory exceed " + std::to_string(kMaxShared));
  if (launch.params.size() != f.param_bytes)
    throw EmulationError(f.name + " takes " + std::to_string(f.param_bytes) + " bytes of parameters, got " +
                         std::to_string(launch.params.size()));
}

}  // namespace

void run_launch(const Launch& request, uint32_t threads, Counters& counters) {
  check(request);
  Launch launch = request;
  DeviceMemory memory = request.memory ? *request.memory : DeviceMemory();
  for (const Variable& variable : launch.module->variables) memory.add(variable.address, variable.size, variable.name);
  launch.memory = &memory;
  std::mutex atomics, results;
  uint64_t total = uint64_t{launch.grid[0]} * launch.grid[1] * launch.grid[2];
  if (threads > 1) launch.atomics = &atomics;
  GlobalAccesses accesses(threads > 1, launch.options.checks);
  launch.accesses = &accesses;
  std::atomic<bool> begins_others{false};
  launch.begins_others = &begins_others;
  std::atomic<uint64_t> next{0};
  std::atomic<bool> failed{false};
  std::string error;
  auto work = [&] {
    Counters mine;
    for (uint64_t i; !failed && (i = next++) < total;) {
      uint32_t id[3] = {static_cast<uint32_t>(i % launch.grid[0]),
                        static_cast<uint32_t>(i / launch.grid[0] % launch.grid[1]),
                        static_cast<uint32_t>(i / (uint64_t{launch.grid[0]} * launch.grid[1]))};
      try {
        Cta(launch, id, mine).run();
      } catch (const std::exception& e) {
        std::lock_guard<std::mutex> lock(results);
        if (!failed.exchange(true)) error = launch.function->name + ", " + e.what();
      }
    }
    std::lock_guard<std::mutex> lock(results);
    counters.add(mine);
  };
  if (threads <= 1) {
    work();
  } else {
    std::vector<std::thread> pool;
    for (uint32_t i = 0; i < threads; ++i) pool.emplace_back(work);
    for (std::thread& one : pool) one.join();
  }
  memory.running->add(accesses.written(), begins_others);
  if (failed) throw EmulationError(error);
}

}  // namespace gnaforge::emulator
