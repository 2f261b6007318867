// One CTA: its memory spaces, barriers, asynchronous work, and the scheduler of its warps.
#pragma once
#include <array>
#include <atomic>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "matrix.h"
#include "mbarrier.h"
#include "memory.h"
#include "ordering.h"
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
  uint64_t patience = 20'000'000;      // instructions of a CTA without any event before it counts as hung
  bool relaxed_warpgroups = false;     // a wgmma sees what any warp of its warpgroup wrote before it issued it
  bool relaxed_tensor_frees = false;   // tcgen05.dealloc may come before the last use of the columns
  bool trace = false;                  // the message of an error ends with what happened before
  bool relaxed_tensor_waits = false;   // tcgen05.ld and st need no tcgen05.wait, as hardware's scoreboards have it
  bool checks = true;                  // for races and uninitialised memory
  bool early = false;                  // it may begin before the launch before it has ended
  bool relaxed_tensor_fences = false;  // accesses to tensor memory by different threads need no tcgen05.fence
};

/// What a launch counted, in warp instructions and bytes.
struct Counters {
  std::vector<uint64_t> executed;  // by instruction
  std::vector<uint64_t> waited;    // by instruction: how often an mbarrier wait found its phase open
  uint64_t instructions = 0, async_load_bytes = 0, async_store_bytes = 0, load_bytes = 0, store_bytes = 0;
  uint64_t mma_operations = 0;  // multiplications and additions
  // Of KV tiles between markers, interior ones and shell ones: how many, and what the warps that mark executed in them.
  uint64_t tiles[2] = {}, tile_instructions[2] = {};
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
  std::mutex* atomics = nullptr;       // CTAs on several cores share device memory
  GlobalAccesses* accesses = nullptr;  // to device memory, by all CTAs
  std::function<void(const std::string&)> print;
  std::atomic<bool>* begins_others = nullptr;  // set where the next one may begin although this one has not waited
  uint32_t threads() const { return block[0] * block[1] * block[2]; }
};

/// The instruction and thread behind something, for messages.
struct Origin {
  uint32_t pc = 0;
  int thread = 0;
};

/// Bulk stores and copies that one thread committed together (PTX ISA: bulk async-group).
struct AsyncGroup {
  bool committed = false;
  uint32_t bulk_stores = 0;                          // the number of the last one in it
  Origin origin;                                     // the same
  uint32_t copies = 0;                               // the number of its warp's last cp.async in it
  int reads_pending = 0, writes_pending = 0;         // operations that have not yet read, or not yet written
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
  const Needs& needs;
  uint32_t id[3], linear_id;
  SharedMemory shared;
  Mbarriers mbarriers;
  std::unique_ptr<Trace> trace;  // null unless asked for
  std::vector<std::unique_ptr<Warp>> warps;
  std::array<NamedBarrier, 16> barriers;
  Counters& counters;
  std::mt19937_64 random;
  uint64_t events = 0;              // anything that may let a blocked warp go on
  uint64_t give_up = ~uint64_t{0};  // the event at which each blocked try_wait returns false
  uint64_t clock = 0;               // instructions executed
  uint32_t exited = 0;              // threads
  SyncPlaces places;                // in shared memory
  std::vector<uint64_t> fences,
      init_fences;           // per thread: when it last executed fence.proxy.async, fence.mbarrier_init
  uint32_t bulk_stores = 0;  // so far
  std::vector<std::deque<std::shared_ptr<AsyncGroup>>> bulk_groups, copy_groups;  // per thread, the last one open
  std::vector<std::vector<std::function<void()>>> after_copies;  // per thread: when its cp.async have landed
  std::unique_ptr<TensorMemory> tensor_memory;  // null unless the kernel, or a function that it may call, uses it
  std::vector<WarpgroupLog> warpgroups;
  DecodedMatrices decoded;
  struct ClusterBarrier {  // barrier.cluster, in a cluster of one
    uint32_t arrived = 0;
    uint64_t generation = 0;
    std::vector<uint64_t> waiting_for;  // per thread; 0: has not arrived
    Clock history, published;
  } cluster_barrier;

  std::vector<Epoch> grid_waits;  // griddepcontrol.wait, by warps
  bool beside = false;            // a marker says that it runs beside the launch before

  bool chance(double probability) { return std::uniform_real_distribution<>()(random) < probability; }
  Timing timing() const { return launch.options.timing; }
  void event() {
    ++events;
    rounds_ = 0;
    last_event_ = clock;
  }
  /// Something changed that only a polling thread could see.
  void progress() { last_event_ = clock; }
  /// A strong access of the thread `warp.lane`, through which threads may synchronise.
  void publish(Warp& warp, Space space, uint64_t address, Ordering order, bool replaces);
  void observe(Warp& warp, Space space, uint64_t address, Ordering order);
  /// Hands over work that completes on its own, at a time that the options choose.
  void submit(std::function<void()> complete);
  /// Work that completes in the order of submission, as the tensor core's does.
  void submit_ordered(std::function<void()> complete);

  // Memory as threads see it. `warp.lane` is the thread; `strong` accesses don't race with each other.
  const uint8_t* read(Warp& warp, Space space, uint64_t address, uint32_t size, bool strong = false);
  uint8_t* write(Warp& warp, Space space, uint64_t address, uint32_t size, bool strong = false);
  /// A shared-memory address from one in the shared or generic space.
  uint32_t shared_address(Space space, uint64_t address) const;
  /// Asynchronous copies start to use device memory: in bounds, and no race.
  /// Whoever has seen `seen` touches device memory.
  void check_begun(const Clock& seen, uint64_t address, uint64_t size) const;
  /// griddepcontrol.wait was executed, and `seen` is later.
  bool waited(const Clock& seen) const;
  void check_bulk_load(Warp& warp, uint64_t address, uint64_t size);
  void check_bulk_store(uint64_t address, uint64_t size, const Clock& clock, bool reduction);
  /// Whether an mbarrier may be signalled through the async proxy by a copy that this thread issues.
  void check_signalled(Warp& warp, uint32_t barrier);
  /// Bytes of an object in constant, param or global space, for engines that read it.
  const uint8_t* object(uint64_t address, uint32_t size) const;

  std::string thread_name(int thread) const;
  /// What runs now: an instruction, or asynchronous work that one has begun.
  Origin origin() const { return running_ ? Origin{running_->group().pc, running_->thread(running_->lane)} : origin_; }
  /// "kernel.ptx:12: opcode ... (source.cu:34): thread 5: "
  std::string place(const Origin& origin) const {
    return module.place(origin.pc) + ": " + thread_name(origin.thread) + ": ";
  }
  void barrier_released(NamedBarrier& barrier);
  void check_exit_barriers();
  /// Releases barrier.cluster once no thread that is left has yet to arrive.
  void check_cluster_barrier();

 private:
  bool step();
  bool complete_one();
  [[noreturn]] void deadlock(const char* what);
  std::string describe_wait(Warp& warp, const Group& group, std::set<uint32_t>& waited);
  std::string describe_history(uint32_t mbarrier) const;
  void count_tiles();
  /// At the end: copies into shared memory that are still under way.
  void check_landings() const;
  void check_end();

  struct Work {
    std::function<void()> complete;
    Origin origin;
  };
  std::vector<Work> pending_;
  std::deque<Work> ordered_;
  Warp* running_ = nullptr;
  Origin origin_;  // of the asynchronous work that completes now
  uint64_t last_event_ = 0;
  size_t turn_ = 0;
  int rounds_ = 0;  // of try_waits that gave up, since the last event
};

}  // namespace gnaforge::emulator
