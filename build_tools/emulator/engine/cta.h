// One CTA: its memory spaces, barriers, asynchronous work, and the scheduler of its warps.
#pragma once
#include <array>
#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "matrix.h"
#include "mbarrier.h"
#include "memory.h"
#include "program.h"
#include "warp.h"

namespace gnaforge::emulator {

/// When asynchronous work completes: at once, as late as it may, or at random.
enum class Timing : uint8_t { eager, lazy, random };
/// Which warp runs next: in turn, one until it blocks, or at random.
enum class Order : uint8_t { round_robin, depth_first, random };

struct Options {
  Timing timing = Timing::eager;
  Order order = Order::round_robin;
  uint64_t seed = 0;
  uint64_t patience = 20'000'000;  // instructions of a CTA without any event before it counts as hung
  bool relaxed_warpgroups = false;    // a wgmma sees what any warp of its warpgroup wrote before it issued it
  bool relaxed_tensor_frees = false;  // tcgen05.dealloc may come before the last use of the columns
  bool relaxed_tensor_waits = false;  // tcgen05.ld and st need no tcgen05.wait, as hardware's scoreboards have it
};

/// What a launch counted, in warp instructions and bytes.
struct Counters {
  std::vector<uint64_t> executed;  // by instruction
  std::vector<uint64_t> waited;    // by instruction: how often an mbarrier wait found its phase open
  uint64_t instructions = 0, async_load_bytes = 0, async_store_bytes = 0, load_bytes = 0, store_bytes = 0;
  void add(const Counters& other);
};

struct Launch {
  std::shared_ptr<const Module> module;
  const Function* function = nullptr;
  uint32_t grid[3] = {1, 1, 1}, block[3] = {1, 1, 1};
  uint32_t dynamic_shared = 0;
  std::vector<uint8_t> params;
  const DeviceMemory* memory = nullptr;
  Options options;
  std::mutex* atomics = nullptr;     // CTAs on several cores share device memory
  std::function<void(const std::string&)> print;
  uint32_t threads() const { return block[0] * block[1] * block[2]; }
};

/// Bulk stores and copies that one thread committed together (PTX ISA: bulk async-group).
struct AsyncGroup {
  bool committed = false;
  int reads_pending = 0, writes_pending = 0;  // operations that have not yet read, or not yet written
  std::vector<std::pair<uint32_t, uint32_t>> reads;  // shared memory that they may read until somebody waits
};

struct NamedBarrier {
  uint32_t expected = 0, arrived = 0;
  bool whole_cta = false;
  uint64_t generation = 0;
  Clock history, published;  // what its arrivals had seen; the same when it was last released
  uint32_t reduction_and = 1, reduction_or = 0, reduction_count = 0;
  uint32_t last_and = 0, last_or = 0, last_count = 0;
};


class Cta {
 public:
  Cta(const Launch& launch, const uint32_t (&id)[3], Counters& counters);
  ~Cta();
  /// Runs to the end. Throws EmulationError with the place and the thread.
  void run();

  const Launch& launch;
  const Module& module;
  uint32_t id[3];
  SharedMemory shared;
  Mbarriers mbarriers;
  std::vector<std::unique_ptr<Warp>> warps;
  std::array<NamedBarrier, 16> barriers;
  Counters& counters;
  std::mt19937_64 random;
  uint64_t events = 0;        // anything that may let a blocked warp go on
  uint64_t clock = 0;         // instructions executed
  uint32_t exited = 0;        // threads
  Clock strong;               // what went through volatile, relaxed, acquire, release and atomic accesses
  std::vector<uint64_t> fences;  // per thread: when it last executed fence.proxy.async
  std::vector<std::deque<std::shared_ptr<AsyncGroup>>> bulk_groups, copy_groups;  // per thread, the last one open
  std::vector<std::vector<std::function<void()>>> after_copies;  // per thread: when its cp.async have landed
  std::unique_ptr<TensorMemory> tensor_memory;  // null unless the module uses it
  std::vector<WarpgroupLog> warpgroups;
  DecodedMatrices decoded;
  struct ClusterBarrier {  // barrier.cluster, in a cluster of one
    uint32_t arrived = 0;
    uint64_t generation = 0;
    std::vector<uint64_t> waiting_for;  // per thread; 0: has not arrived
    Clock history;
  } cluster_barrier;

  bool chance(double probability) { return std::uniform_real_distribution<>()(random) < probability; }
  Timing timing() const { return launch.options.timing; }
  void event() {
    ++events;
    last_event_ = clock;
  }
  /// Something changed that only a polling thread could see.
  void progress() { last_event_ = clock; }
  /// An access that threads may synchronise through, whatever its exact order is.
  void synchronise(Warp& warp) {
    strong.join(warp.publish());
    warp.clock.join(strong);
  }
  /// Hands over work that completes on its own, at a time that the options choose.
  void submit(std::function<void()> complete);
  /// Work that completes in the order of submission, as the tensor core's does.
  void submit_ordered(std::function<void()> complete);

  // Memory as threads see it. `warp.lane` is the thread; `strong` accesses are ones that threads may synchronise through.
  const uint8_t* read(Warp& warp, Space space, uint64_t address, uint32_t size, bool strong = false);
  uint8_t* write(Warp& warp, Space space, uint64_t address, uint32_t size, bool strong = false);
  /// A shared-memory address from one in the shared or generic space.
  uint32_t shared_address(Space space, uint64_t address) const;
  /// Bytes of an object in constant, param or global space, for engines that read it.
  const uint8_t* object(uint64_t address, uint32_t size) const;

  std::string thread_name(int thread) const;
  void barrier_released(NamedBarrier& barrier);
  void check_exit_barriers();

 private:
  bool step();
  bool complete_one();
  [[noreturn]] void deadlock(const char* what);
  std::string describe_wait(Warp& warp, const Group& group);
  void check_end();

  std::vector<std::function<void()>> pending_;
  std::deque<std::function<void()>> ordered_;
  uint64_t last_event_ = 0;
  size_t turn_ = 0;
};

}  // namespace gnaforge::emulator
