#include "cta.h"

#include <algorithm>
#include <map>

#include "matrix.h"
#include "recording.h"

namespace gnaforge::emulator {

void Counters::add(const Counters& other) {
  executed.resize(std::max(executed.size(), other.executed.size()));
  waited.resize(executed.size());
  for (size_t i = 0; i < other.executed.size(); ++i) executed[i] += other.executed[i];
  for (size_t i = 0; i < other.waited.size(); ++i) waited[i] += other.waited[i];
  instructions += other.instructions;
  async_load_bytes += other.async_load_bytes;
  async_store_bytes += other.async_store_bytes;
  load_bytes += other.load_bytes;
  store_bytes += other.store_bytes;
  mma_operations += other.mma_operations;
  for (int i = 0; i < 2; ++i) {
    tiles[i] += other.tiles[i];
    tile_instructions[i] += other.tile_instructions[i];
  }
}

namespace {

uint64_t special_value(const std::string& name, const Cta& cta, const Warp& warp, int lane) {
  const Launch& launch = cta.launch;
  uint32_t thread = static_cast<uint32_t>(warp.thread(lane));
  uint32_t position[3] = {thread % launch.block[0], thread / launch.block[0] % launch.block[1],
                          thread / (launch.block[0] * launch.block[1])};
  auto axis = [&](const char* prefix) {
    size_t length = std::string(prefix).size();
    return name.compare(0, length, prefix) == 0 && name.size() == length + 1 ? name[length] - 'x' : -1;
  };
  int i;
  if ((i = axis("%tid.")) >= 0) return position[i];
  if ((i = axis("%ntid.")) >= 0) return launch.block[i];
  if ((i = axis("%ctaid.")) >= 0 || (i = axis("%clusterid.")) >= 0) return cta.id[i];
  if ((i = axis("%nctaid.")) >= 0 || (i = axis("%nclusterid.")) >= 0) return launch.grid[i];
  if (axis("%cluster_ctaid.") >= 0 || name == "%cluster_ctarank") return 0;
  if (axis("%cluster_nctaid.") >= 0 || name == "%cluster_nctarank") return 1;
  if (name == "%is_explicit_cluster") return 0;
  if (name == "%laneid") return static_cast<uint64_t>(lane);
  if (name == "%warpid") return static_cast<uint64_t>(warp.index);
  if (name == "%nwarpid") return (launch.threads() + 31) / 32;
  if (name == "%smid") return (cta.id[0] + launch.grid[0] * (cta.id[1] + uint64_t{launch.grid[1]} * cta.id[2])) % 132;
  if (name == "%nsmid") return 132;
  if (name == "%lanemask_eq") return uint64_t{1} << lane;
  if (name == "%lanemask_lt") return (uint64_t{1} << lane) - 1;
  if (name == "%lanemask_le") return (uint64_t{2} << lane) - 1;
  if (name == "%lanemask_gt") return ~((uint64_t{2} << lane) - 1) & 0xffffffffu;
  if (name == "%lanemask_ge") return ~((uint64_t{1} << lane) - 1) & 0xffffffffu;
  if (name == "%dynamic_smem_size") return launch.dynamic_shared;
  if (name == "%total_smem_size") return cta.shared.end();
  if (name == "%gridid" || name.compare(0, 6, "%clock") == 0 || name.compare(0, 12, "%globaltimer") == 0) return 0;
  throw EmulationError("unknown special register " + name);
}

}  // namespace

Cta::Cta(const Launch& launch_, const uint32_t (&id_)[3], Counters& counters_)
    : launch(launch_),
      module(*launch_.module),
      needs(launch_.function->needs),
      id{id_[0], id_[1], id_[2]},
      linear_id(id_[0] + launch_.grid[0] * (id_[1] + launch_.grid[1] * id_[2])),
      shared(needs.dynamic_shared + launch_.dynamic_shared, launch_.options.checks),
      counters(counters_),
      fences(launch_.threads()),
      init_fences(launch_.threads()),
      bulk_groups(launch_.threads()),
      copy_groups(launch_.threads()),
      after_copies(launch_.threads()),
      warpgroups((launch_.threads() + 127) / 128) {
  random.seed(launch.options.seed * 0x9e3779b97f4a7c15u + id[0] + 65537u * (id[1] + 65537u * uint64_t{id[2]}));
  counters.executed.resize(module.code.size());
  counters.waited.resize(module.code.size());
  int threads = static_cast<int>(launch.threads());
  if (launch.options.trace)
    trace = std::make_unique<Trace>(module, static_cast<size_t>((threads + kWarpSize - 1) / kWarpSize));
  mbarriers.trace = trace.get();
  mbarriers.clock = &clock;
  if (needs.tcgen05) tensor_memory = std::make_unique<TensorMemory>(!launch.options.relaxed_tensor_fences);
  for (int first = 0; first < threads; first += kWarpSize) {
    int lanes = std::min(kWarpSize, threads - first);
    uint32_t alive = lanes == kWarpSize ? ~0u : (1u << lanes) - 1;
    warps.push_back(std::make_unique<Warp>(*this, first / kWarpSize, alive));
    Warp& warp = *warps.back();
    if (needs.wgmma || needs.tcgen05) warp.matrix = std::make_unique<MatrixState>(needs.register_count);
    for (const Needs::SpecialRegister& special : needs.specials) {
      Operand op;
      op.kind = Operand::Kind::reg;
      op.slot = special.slot;
      op.type = special.name == "%is_explicit_cluster"                                                      ? Type::pred
                : special.name == "%clock64" || special.name == "%globaltimer" || special.name == "%gridid" ? Type::u64
                                                                                                            : Type::u32;
      for (int lane = 0; lane < kWarpSize; ++lane)
        warp.put_bits(op, lane, special_value(special.name, *this, warp, lane));
    }
  }
}

Cta::~Cta() = default;

std::string Cta::thread_name(int thread) const {
  uint32_t t = static_cast<uint32_t>(thread);
  std::string name = "thread " + std::to_string(t % launch.block[0]);
  if (launch.block[1] * launch.block[2] > 1)
    name += "," + std::to_string(t / launch.block[0] % launch.block[1]) + "," +
            std::to_string(t / (launch.block[0] * launch.block[1]));
  return name;
}

void Cta::submit(std::function<void()> complete) {
  if (timing() == Timing::eager || (timing() == Timing::random && chance(0.25))) return complete();
  pending_.push_back({std::move(complete), origin()});
}

void Cta::submit_ordered(std::function<void()> complete) {
  if (ordered_.empty() && (timing() == Timing::eager || (timing() == Timing::random && chance(0.25))))
    return complete();
  ordered_.push_back({std::move(complete), origin()});
}

bool Cta::complete_one() {
  size_t choices = pending_.size() + (ordered_.empty() ? 0 : 1);
  if (choices == 0) return false;
  size_t pick = random() % choices;
  Work work;
  if (pick == pending_.size()) {
    work = std::move(ordered_.front());
    ordered_.pop_front();
  } else {
    work = std::move(pending_[pick]);
    pending_[pick] = std::move(pending_.back());
    pending_.pop_back();
  }
  running_ = nullptr;
  origin_ = work.origin;
  try {
    work.complete();
  } catch (const std::exception& error) {
    throw EmulationError(place(origin_) + "when its asynchronous work completed: " + error.what());
  }
  return true;
}

void Cta::run() {
  note(Event::cta, 0, 0);
  try {
    while (exited < launch.threads()) {
      if (!step()) {
        if (complete_one()) continue;
        // try_wait blocks for a limited time only, so nothing is stuck before each had its chances to give up.
        constexpr int kRounds = 8;
        if (rounds_++ == kRounds) deadlock("deadlock: no warp can go on and no asynchronous work is left");
        give_up = ++events;
        continue;
      }
      if (timing() == Timing::random && chance(0.25)) {
        complete_one();
        Warp& warp = *warps[random() % warps.size()];
        if (warp.matrix) compute_oldest(warp);
      }
      uint64_t quiet = clock - last_event_;
      // A polling loop never blocks, so late completions must come to it.
      if (quiet > 100'000 && complete_one()) continue;
      if (quiet > launch.options.patience)
        deadlock("hung: instructions run, but nothing changes that another warp could see");
    }
    check_landings();
    while (complete_one()) {
    }
    check_end();
  } catch (const EmulationError& error) {
    throw EmulationError("CTA " + std::to_string(id[0]) + "," + std::to_string(id[1]) + "," + std::to_string(id[2]) +
                         ": " + error.what() + (trace ? trace->report() : ""));
  }
  counters.instructions += clock;
  count_tiles();
}

void Cta::count_tiles() {
  // All warps that compute go through the same tiles, so one of them says how many there are.
  const TileMarks* one = nullptr;
  for (const auto& warp : warps) {
    warp->marks.end();
    for (int i = 0; i < 2; ++i) counters.tile_instructions[i] += warp->marks.instructions[i];
    if (!one && warp->marks.tiles[0] + warp->marks.tiles[1] > 0) one = &warp->marks;
  }
  for (int i = 0; one && i < 2; ++i) counters.tiles[i] += one->tiles[i];
}

bool Cta::step() {
  size_t count = warps.size(), runnable = 0;
  auto can_run = [&](const Warp& warp) {
    return warp.alive && (warp.stalled_at == kRunnable || warp.stalled_at != events);
  };
  for (const auto& warp : warps) runnable += can_run(*warp);
  if (runnable == 0) return false;
  size_t pick = turn_;
  uint64_t budget = 64;
  if (launch.options.order == Order::random) {
    size_t nth = random() % runnable;
    for (pick = 0;; ++pick)
      if (can_run(*warps[pick]) && nth-- == 0) break;
    constexpr uint64_t kBudgets[] = {1, 16, 128, 1024, 8192};  // short and long turns find different races
    budget = kBudgets[random() % 5];
  } else {
    if (launch.options.order == Order::depth_first) budget = 4096;
    while (!can_run(*warps[pick % count])) ++pick;
    pick %= count;
    turn_ = launch.options.order == Order::depth_first ? pick : pick + 1;
  }
  Warp& warp = *warps[pick];
  warp.stalled_at = kRunnable;
  running_ = &warp;
  try {
    warp.run(budget);
  } catch (const std::exception& error) {
    throw EmulationError(place(origin()) + error.what());
  }
  // In depth-first order a warp that yields or spins must not keep the others out.
  if (launch.options.order == Order::depth_first && (warp.yields || clock - last_event_ > 50'000)) turn_ = pick + 1;
  return true;
}

std::string Cta::describe_history(uint32_t address) const {
  const Mbarrier* barrier = mbarriers.find(address);
  if (!barrier) return "";
  std::string out = "\n  mbarrier " + hex(address) + " was initialised for " + std::to_string(barrier->expected) +
                    " arrival" + (barrier->expected == 1 ? "" : "s") + " at " + module.place(barrier->init_pc);
  if (barrier->last_warp < 0) {
    out += "; no thread has arrived at it";
  } else {
    out += "; arrivals came from warp";
    if (__builtin_popcountll(barrier->arrivers) > 1) out += "s";
    for (uint64_t rest = barrier->arrivers; rest; rest &= rest - 1) out += " " + std::to_string(__builtin_ctzll(rest));
    out +=
        ", the last one from warp " + std::to_string(barrier->last_warp) + " at " + module.place(barrier->last_arrival);
  }
  // What a swapped parity looks like: the phase that was meant is over, or the one that was meant comes first.
  uint64_t over = 1 - (barrier->phase & 1);
  return out + ". Its phase " + std::to_string(barrier->phase) + " is under way: a wait for parity " +
         std::to_string(over) +
         (barrier->phase == 0 ? " passes, as always at a fresh mbarrier"
                              : " passes, phase " + std::to_string(barrier->phase - 1) + " is over") +
         "; one for parity " + std::to_string(barrier->phase & 1) + " needs the missing arrivals and bytes";
}

std::string Cta::describe_wait(Warp& warp, const Group& group, std::set<uint32_t>& waited) {
  const Instruction& in = module.code[group.pc];
  int lane = __builtin_ctz(group.mask);
  const std::string& name = in.parts[0];
  if (name == "mbarrier" && (in.parts[1] == "try_wait" || in.parts[1] == "test_wait")) {
    uint32_t address = shared_address(in.space, warp.address(in.args[1], lane));
    waited.insert(address);
    std::string wanted =
        in.has("parity") ? " for the end of a phase of parity " + std::to_string(warp.bits(in.args[2], lane)) : "";
    return "waits" + wanted + " at " + mbarriers.describe(address);
  }
  if ((name == "bar" || name == "barrier") && in.parts[1] != "warp" && in.parts[1] != "cluster") {
    const Operand& which = in.args.at(in.has("red") ? 1 : 0);
    uint32_t barrier = static_cast<uint32_t>(warp.bits(which, lane));
    if (group.token == 0) return "waits for the other lanes of its warp before barrier " + std::to_string(barrier);
    return "waits at barrier " + std::to_string(barrier) + " (" + std::to_string(barriers[barrier % 16].arrived) +
           " of " + std::to_string(barriers[barrier % 16].expected) + " threads arrived)";
  }
  return "waits for other lanes of its warp, or for asynchronous work";
}

void Cta::deadlock(const char* what) {
  std::string report = what;
  std::map<std::string, std::vector<int>> waiting;
  std::set<uint32_t> barriers_waited_for;
  for (auto& warp : warps)
    for (const Group& group : warp->groups) {
      if (!(group.mask & warp->alive)) continue;
      std::string lanes = group.mask == warp->alive && warp->alive == ~0u ? "" : ", lanes " + hex(group.mask);
      waiting[module.place(group.pc) + ": " + describe_wait(*warp, group, barriers_waited_for) + lanes].push_back(
          warp->index);
    }
  for (const auto& entry : waiting) {
    report += "\n  warp";
    if (entry.second.size() > 1) report += "s";
    for (int index : entry.second) report += " " + std::to_string(index);
    report += ": " + entry.first;
  }
  std::string gone;
  for (auto& warp : warps)
    if (!warp->alive) gone += " " + std::to_string(warp->index);
  if (!gone.empty()) report += "\n  warps that have exited:" + gone;
  for (uint32_t mbarrier : barriers_waited_for) report += describe_history(mbarrier);
  throw EmulationError(report);
}

void Cta::check_landings() const {
  for (const Work& work : pending_) {
    const Instruction& in = module.code[work.origin.pc];
    if (in.parts[0] == "cp" && in.space == Space::shared)
      throw EmulationError(place(work.origin) +
                           "the CTA ended while this copy into its shared memory was under way: nobody waited for it");
  }
}

void Cta::check_end() {
  for (size_t thread = 0; thread < bulk_groups.size(); ++thread)
    for (const auto& group : bulk_groups[thread])
      if (!group->reads.empty())
        throw EmulationError(place(group->origin) +
                             "exited though its bulk store from shared memory may still read: "
                             "cp.async.bulk.wait_group.read is missing");
  for (const auto& warp : warps) {
    if (!warp->matrix || !warp->matrix->busy) continue;
    const Instruction* last = warp->matrix->last;
    std::string name =
        place({static_cast<uint32_t>(last - module.code.data()), warp->thread(0)}) + "its warp exited with ";
    if (!warp->matrix->loading.empty())
      throw EmulationError(name + "this tcgen05.ld in flight: tcgen05.wait::ld is missing");
    throw EmulationError(name + std::to_string(warp->matrix->busy) +
                         " wgmma in flight, this one the last: wgmma.wait_group is missing");
  }
  if (tensor_memory) tensor_memory->check_end();
  if (beside && launch.options.early && grid_waits.empty())
    throw EmulationError(
        "ends without griddepcontrol.wait, in a launch that runs beside the one before it: who waits for this one "
        "doesn't wait for that one");
}

void Cta::barrier_released(NamedBarrier& barrier) {
  ++barrier.generation;
  barrier.published = barrier.history;
  barrier.last_and = barrier.reduction_and;
  barrier.last_or = barrier.reduction_or;
  barrier.last_count = barrier.reduction_count;
  barrier.reduction_and = 1;
  barrier.reduction_or = barrier.reduction_count = 0;
  barrier.arrived = 0;
  barrier.whole_cta = false;
  event();
}

void Cta::check_exit_barriers() {
  for (NamedBarrier& barrier : barriers)
    if (barrier.whole_cta && barrier.arrived > 0 && barrier.arrived >= launch.threads() - exited)
      barrier_released(barrier);
  check_cluster_barrier();
}

void Cta::check_cluster_barrier() {
  ClusterBarrier& cluster = cluster_barrier;
  if (cluster.arrived == 0) return;
  for (const auto& warp : warps)
    for (uint32_t rest = warp->alive; rest; rest &= rest - 1)
      if (cluster.waiting_for[static_cast<size_t>(warp->thread(__builtin_ctz(rest)))] <= cluster.generation) return;
  cluster.arrived = 0;
  cluster.published = cluster.history;
  ++cluster.generation;
  event();
}

uint32_t Cta::shared_address(Space space, uint64_t address) const {
  if (space == Space::generic) {
    if ((address & kWindowMask) != kSharedWindow)
      throw EmulationError(hex(address) + " is not an address in shared memory");
    address &= ~kWindowMask;
  }
  if (address > 0xffffffffu) throw EmulationError("shared address " + hex(address) + " exceeds 32 bits");
  return static_cast<uint32_t>(address);
}

const uint8_t* Cta::object(uint64_t address, uint32_t size) const {
  if ((address & kWindowMask) == kParamWindow) {
    uint64_t offset = address & ~kWindowMask;
    if (offset + size > launch.params.size())
      throw EmulationError("kernel parameters end before " + hex(offset + size));
    return launch.params.data() + offset;
  }
  launch.memory->check(address, size);
  return reinterpret_cast<const uint8_t*>(address);
}

namespace {
bool in_shared(Space space, uint64_t address) {
  return space == Space::shared || (space == Space::generic && (address & kWindowMask) == kSharedWindow);
}
[[noreturn]] void misaligned(uint64_t address, uint32_t size) {
  throw EmulationError("unaligned access: " + std::to_string(size) + " bytes at " + hex(address));
}
}  // namespace

const uint8_t* Cta::read(Warp& warp, Space space, uint64_t address, uint32_t size, bool strong) {
  if (address & (size - 1)) misaligned(address, size);
  uint64_t window = address & kWindowMask;
  if (in_shared(space, address))
    return shared.read(shared_address(space, address), size, warp.clock, warp.epoch(strong));
  if (space == Space::local || window == kLocalWindow) {
    uint64_t offset = address & ~kWindowMask;
    if (offset + size > needs.local_bytes) throw EmulationError("local memory out of bounds: " + hex(offset));
    return warp.local.data() + static_cast<size_t>(warp.lane) * needs.local_bytes + offset;
  }
  if (space == Space::param && window == 0) address |= kParamWindow;
  if (space == Space::global && window != 0) throw EmulationError(hex(address) + " is not an address in global memory");
  const uint8_t* bytes = object(address, size);
  if ((address & kWindowMask) == 0) {
    check_begun(warp.clock, address, size);
    launch.accesses->read(address, size, linear_id, warp.clock, warp.epoch(strong));
  }
  return bytes;
}

uint8_t* Cta::write(Warp& warp, Space space, uint64_t address, uint32_t size, bool strong) {
  if (address & (size - 1)) misaligned(address, size);
  uint64_t window = address & kWindowMask;
  if (in_shared(space, address))
    return shared.write(shared_address(space, address), size, clock, static_cast<uint16_t>(warp.thread(warp.lane)),
                        warp.clock, warp.epoch(strong));
  if (space == Space::local || window == kLocalWindow) {
    uint64_t offset = address & ~kWindowMask;
    if (offset + size > needs.local_bytes) throw EmulationError("local memory out of bounds: " + hex(offset));
    return warp.local.data() + static_cast<size_t>(warp.lane) * needs.local_bytes + offset;
  }
  if (window != 0 || space == Space::param || space == Space::constant)
    throw EmulationError("write to read-only memory at " + hex(address));
  launch.memory->check(address, size);
  check_begun(warp.clock, address, size);
  launch.accesses->write(address, size, linear_id, warp.clock, warp.epoch(strong));
  return reinterpret_cast<uint8_t*>(address);
}

void Cta::publish(Warp& warp, Space space, uint64_t address, Ordering order, bool replaces) {
  if (in_shared(space, address))
    places.publish(shared_address(space, address), warp, order, replaces);
  else
    launch.accesses->publish(address, warp, order, replaces);
}

void Cta::observe(Warp& warp, Space space, uint64_t address, Ordering order) {
  if (in_shared(space, address))
    places.observe(shared_address(space, address), warp, order);
  else
    launch.accesses->observe(address, warp, order);
}

bool Cta::waited(const Clock& seen) const {
  for (const Epoch& wait : grid_waits)
    if (wait.before(seen)) return true;
  return false;
}

void Cta::check_begun(const Clock& seen, uint64_t address, uint64_t size) const {
  if (!launch.options.early || !launch.options.checks || waited(seen)) return;
  if (!beside)
    throw EmulationError(
        "touches device memory before griddepcontrol.wait, in a launch that may begin before the one before it has "
        "ended");
  if (launch.memory->running->hold(address, size))
    throw EmulationError("touches global memory at " + hex(address) +
                         ", which a launch writes that it runs beside, before griddepcontrol.wait");
}

void Cta::check_bulk_load(Warp& warp, uint64_t address, uint64_t size) {
  launch.memory->check(address, size);
  check_begun(warp.clock, address, size);
  launch.accesses->read(address, size, linear_id, warp.clock, warp.epoch());
}

void Cta::check_bulk_store(uint64_t address, uint64_t size, const Clock& seen, bool reduction) {
  launch.memory->check(address, size);
  check_begun(seen, address, size);
  launch.accesses->write(address, size, linear_id, seen, {bulk_stores, kBulkStoreAgent, reduction});
}

void Cta::check_signalled(Warp& warp, uint32_t address) {
  const Mbarrier& barrier = mbarriers.used_by(address, warp);
  uint16_t thread = static_cast<uint16_t>(warp.thread(warp.lane));
  if (barrier.initialised > std::max({init_fences[barrier.initialiser], fences[barrier.initialiser], fences[thread]}))
    throw EmulationError("a copy completes on the mbarrier at " + hex(address) + ", but " +
                         thread_name(barrier.initialiser) +
                         ", which initialised it, has made that visible to the async proxy neither by "
                         "fence.mbarrier_init nor by fence.proxy.async");
}

}  // namespace gnaforge::emulator
