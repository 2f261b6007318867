// PTX ISA: Control Flow Instructions; barriers and fences of Parallel Synchronization and Communication; Miscellaneous.
#include <algorithm>
#include <map>

#include "opcodes.h"

namespace gnaforge::emulator {
namespace {

// --- branches and calls

Status branch(Warp& warp, const Instruction& in, uint32_t mask) {
  warp.jump(mask, in.target);
  return Status::jumped;
}
void decode_bra(Instruction& in) {
  expect_count(in, 1, 1);
  in.run = branch;
}

/// Splits the current group: lanes of `targets` go there, the others to the next instruction.
void scatter(Warp& warp, const std::map<uint32_t, uint32_t>& targets) {
  Group from = warp.group();
  uint32_t moved = 0;
  warp.groups.erase(warp.groups.begin() + static_cast<std::ptrdiff_t>(warp.current));
  for (const auto& target : targets) {
    warp.groups.push_back({target.first, target.second, kRunnable, 0});
    moved |= target.second;
  }
  if (from.mask & ~moved) warp.groups.push_back({from.pc + 1, from.mask & ~moved, kRunnable, 0});
  warp.current = warp.groups.size() - 1;
}

Status branch_indexed(Warp& warp, const Instruction& in, uint32_t mask) {
  std::map<uint32_t, uint32_t> targets;
  each_lane(warp, mask, [&](int lane) {
    uint64_t index = warp.bits(in.args[0], lane);
    const auto& labels = in.args[1].parts;
    if (index >= labels.size())
      throw EmulationError("brx.idx with index " + std::to_string(index) + " of " + std::to_string(labels.size()));
    targets[static_cast<uint32_t>(labels[index].value)] |= 1u << lane;
  });
  scatter(warp, targets);
  return Status::jumped;
}
void decode_brx(Instruction& in) { in.run = branch_indexed; }

uint8_t* local_at(Warp& warp, int lane, uint64_t address) {
  return warp.local.data() + static_cast<size_t>(lane) * warp.cta.needs.local_bytes + (address & ~kWindowMask);
}

/// The text that an address in device memory points to.
std::string text_at(Warp& warp, uint64_t address) {
  std::string text;
  for (;; ++address) {
    char c = static_cast<char>(*warp.cta.read(warp, Space::generic, address, 1));
    if (c == 0) return text;
    text += c;
  }
}

/// printf's format with arguments packed as the device's calling convention does.
std::string format(Warp& warp, const std::string& pattern, uint64_t arguments) {
  std::string out;
  uint64_t at = arguments;
  auto next = [&](uint32_t size) {
    at = (at + size - 1) / size * size;
    uint64_t value = 0;
    std::memcpy(&value, warp.cta.read(warp, Space::generic, at, size), size);
    at += size;
    return value;
  };
  for (size_t i = 0; i < pattern.size(); ++i) {
    if (pattern[i] != '%') {
      out += pattern[i];
      continue;
    }
    size_t end = pattern.find_first_of("diouxXcsfFeEgGp%", i + 1);
    if (end == std::string::npos) return out + pattern.substr(i);
    std::string spec = pattern.substr(i, end - i + 1);
    char kind = pattern[end], text[400];
    bool wide = spec.find("ll") != std::string::npos || spec.find('l') != std::string::npos ||
                spec.find('z') != std::string::npos;
    i = end;
    if (kind == '%') {
      out += '%';
      continue;
    }
    if (kind == 's') {
      std::snprintf(text, sizeof text, spec.c_str(), text_at(warp, next(8)).c_str());
    } else if (std::string("fFeEgG").find(kind) != std::string::npos) {
      uint64_t bits = next(8);
      double value;
      std::memcpy(&value, &bits, 8);
      std::snprintf(text, sizeof text, spec.c_str(), value);
    } else if (kind == 'p') {
      std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(next(8)));
    } else if (wide) {
      std::snprintf(text, sizeof text, spec.c_str(), static_cast<long long>(next(8)));
    } else {
      std::snprintf(text, sizeof text, spec.c_str(), static_cast<int>(next(4)));
    }
    out += text;
  }
  return out;
}

struct Call {
  const Operand* returns = nullptr;
  const Operand* arguments = nullptr;
  std::string name;
};
Call parts_of(const Instruction& in) {
  Call call;
  for (const Operand& op : in.args) {
    if (op.kind == Operand::Kind::label) {
      call.name = op.symbol;
    } else if (op.kind == Operand::Kind::vector) {
      (call.name.empty() ? call.returns : call.arguments) = &op;
    }
  }
  return call;
}

void copy_values(Warp& warp, int lane, const std::vector<Operand>& actual, const std::vector<std::string>& formal,
                 const std::vector<uint32_t>& sizes, bool to_formal) {
  for (size_t i = 0; i < formal.size() && i < actual.size(); ++i) {
    uint8_t* a = local_at(warp, lane, static_cast<uint64_t>(actual[i].value));
    uint8_t* f = local_at(warp, lane, std::stoull(formal[i]));
    std::memcpy(to_formal ? f : a, to_formal ? a : f, sizes[i]);
  }
}

Status call(Warp& warp, const Instruction& in, uint32_t mask) {
  Call parts = parts_of(in);
  if (in.detail[0]) {
    const Function& callee = warp.cta.module.functions[0];
    const Function* target = &callee;
    for (const Function& f : warp.cta.module.functions)
      if (f.name == parts.name) target = &f;
    uint32_t pc = warp.group().pc;
    each_lane(warp, mask, [&](int lane) {
      auto& frames = warp.calls[static_cast<size_t>(lane)];
      for (const Frame& frame : frames)
        if (warp.cta.module.code[frame.call].target == in.target) throw EmulationError("recursion is not emulated");
      if (parts.arguments)
        copy_values(warp, lane, parts.arguments->parts, target->param_names, target->param_sizes, true);
      frames.push_back({pc + 1, pc});
    });
    warp.jump(mask, in.target);
    return Status::jumped;
  }
  auto argument = [&](int lane, size_t i, uint32_t size) {
    if (!parts.arguments || i >= parts.arguments->parts.size())
      throw EmulationError("missing argument of " + parts.name);
    uint64_t value = 0;
    std::memcpy(&value, local_at(warp, lane, static_cast<uint64_t>(parts.arguments->parts[i].value)), size);
    return value;
  };
  if (parts.name == "vprintf") {
    each_lane(warp, mask, [&](int lane) {
      std::string pattern = text_at(warp, argument(lane, 0, 8));
      warp.cta.launch.print(format(warp, pattern, argument(lane, 1, 8)));
      if (parts.returns) *local_at(warp, lane, static_cast<uint64_t>(parts.returns->parts[0].value)) = 0;
    });
    return Status::next;
  }
  if (parts.name == "__assertfail") {
    int lane = warp.lane;
    throw EmulationError("assertion failed: " + text_at(warp, argument(lane, 0, 8)) + " (" +
                         text_at(warp, argument(lane, 1, 8)) + ":" + std::to_string(argument(lane, 2, 4)) + ")");
  }
  throw EmulationError("call of " + parts.name + ", which this module doesn't define");
}
void decode_call(Instruction& in) { in.run = call; }

Status leave(Warp& warp, const Instruction& in, uint32_t mask) {
  std::map<uint32_t, uint32_t> targets;
  uint32_t done = 0;
  each_lane(warp, mask, [&](int lane) {
    auto& frames = warp.calls[static_cast<size_t>(lane)];
    if (in.parts[0] == "exit" || frames.empty()) {
      done |= 1u << lane;
      return;
    }
    Frame frame = frames.back();
    frames.pop_back();
    const Instruction& caller = warp.cta.module.code[frame.call];
    Call parts = parts_of(caller);
    if (parts.returns)
      if (const Function* callee = warp.cta.module.find(parts.name))
        copy_values(warp, lane, parts.returns->parts, callee->return_names, callee->return_sizes, false);
    targets[frame.pc] |= 1u << lane;
  });
  if (!targets.empty()) {
    if (done) throw EmulationError("lanes of one warp return from different depths at once");
    scatter(warp, targets);
  } else {
    warp.exit(done);
    warp.cta.check_exit_barriers();
  }
  return Status::jumped;
}
void decode_leave(Instruction& in) { in.run = leave; }

Status trap(Warp&, const Instruction&, uint32_t) { throw EmulationError("trap"); }
void decode_trap(Instruction& in) { in.run = trap; }

// --- barriers

bool whole_warp(Warp& warp, uint32_t mask) { return (mask & warp.alive) == warp.alive; }

enum BarrierAction { sync, arrive, reduce_and, reduce_or, reduce_count };

Status barrier(Warp& warp, const Instruction& in, uint32_t mask) {
  Cta& cta = warp.cta;
  auto action = static_cast<BarrierAction>(in.detail[0]);
  size_t first = action >= reduce_and ? 1 : 0;  // operands before the barrier's number
  size_t count_at = first + 1;
  bool counted = in.args.size() > count_at + (action >= reduce_and ? 1 : 0);
  // Also without .aligned: lanes of a warp that come one by one would count twice.
  if (warp.group().token == 0 && in.detail[1] && !whole_warp(warp, mask)) return Status::blocked;
  uint32_t number = warp.uniform(in.args[first], mask, "the barrier's number");
  if (number > 15) throw EmulationError("barrier " + std::to_string(number) + " is not in 0..15");
  NamedBarrier& at = cta.barriers[number];
  if (warp.group().token == 0) {
    uint32_t expected =
        counted ? warp.uniform(in.args[count_at], mask, "the barrier's thread count") : cta.launch.threads();
    if (counted && (expected == 0 || expected % kWarpSize))
      throw EmulationError("barrier thread count " + std::to_string(expected) + " is not a positive multiple of 32");
    if (at.arrived && at.expected != expected)
      throw EmulationError("barrier " + std::to_string(number) + " is in use for " + std::to_string(at.expected) +
                           " threads, now for " + std::to_string(expected));
    at.expected = expected;
    at.whole_cta = !counted;
    // Barriers count whole warps.
    auto lanes = static_cast<uint32_t>(in.detail[1] ? (counted ? kWarpSize : __builtin_popcount(warp.alive))
                                                    : __builtin_popcount(mask));
    if (action >= reduce_and) {
      uint32_t predicate = warp.predicate(in.args.back()) & mask;
      at.reduction_and &= predicate == mask;
      at.reduction_or |= predicate != 0;
      at.reduction_count += static_cast<uint32_t>(__builtin_popcount(predicate));
    }
    note(Event::barrier, number, at.generation);
    at.arrived += lanes;
    at.history.join(warp.publish());
    uint32_t needed = counted ? expected : expected - cta.exited;
    if (at.arrived > needed)
      throw EmulationError("barrier " + std::to_string(number) + " for " + std::to_string(expected) +
                           " threads is entered by " + std::to_string(at.arrived));
    uint64_t ticket = at.generation + 1;
    if (at.arrived == needed) cta.barrier_released(at);
    if (action == arrive) return Status::next;
    if (at.generation < ticket) {
      warp.group().token = ticket;
      return Status::blocked;
    }
  } else if (at.generation < warp.group().token) {
    return Status::blocked;
  }
  warp.group().token = 0;
  warp.clock.join(at.published);
  if (action >= reduce_and) {
    if (action == reduce_count) {
      each_lane(warp, mask, [&](int lane) { warp.put_bits(in.args[0], lane, at.last_count); });
    } else {
      bool value = action == reduce_and ? at.last_and : at.last_or;
      warp.put_predicate(in.args[0], mask, value ? ~0u : 0u);
    }
  }
  return Status::next;
}

Status warp_barrier(Warp& warp, const Instruction& in, uint32_t mask) {
  uint32_t members = static_cast<uint32_t>(warp.bits(in.args[0], warp.lane)) & warp.alive;
  return (mask & members) == members ? Status::next : Status::blocked;
}

/// barrier.cluster in a cluster of one CTA.
Status cluster_arrive(Warp& warp, const Instruction& in, uint32_t mask) {
  Cta& cta = warp.cta;
  if (in.has("aligned") && !whole_warp(warp, mask)) return Status::blocked;
  auto& cluster = cta.cluster_barrier;
  cluster.waiting_for.resize(cta.launch.threads());
  each_lane(warp, mask, [&](int lane) {
    uint64_t& waiting = cluster.waiting_for[static_cast<size_t>(warp.thread(lane))];
    if (waiting) throw EmulationError("barrier.cluster.arrive twice without a wait between");
    waiting = cluster.generation + 1;
    ++cluster.arrived;
  });
  cluster.history.join(in.has("relaxed") ? warp.fenced : warp.publish());
  cta.check_cluster_barrier();
  return Status::next;
}
Status cluster_wait(Warp& warp, const Instruction& in, uint32_t mask) {
  Cta& cta = warp.cta;
  if (in.has("aligned") && !whole_warp(warp, mask)) return Status::blocked;
  auto& cluster = cta.cluster_barrier;
  cluster.waiting_for.resize(cta.launch.threads());
  bool ready = true;
  each_lane(warp, mask, [&](int lane) {
    uint64_t waiting = cluster.waiting_for[static_cast<size_t>(warp.thread(lane))];
    if (!waiting) throw EmulationError("barrier.cluster.wait without arrive");
    ready &= cluster.generation >= waiting;
  });
  if (!ready) return Status::blocked;
  warp.clock.join(cluster.published);
  each_lane(warp, mask, [&](int lane) { cluster.waiting_for[static_cast<size_t>(warp.thread(lane))] = 0; });
  return Status::next;
}

void decode_barrier(Instruction& in) {
  bool reduces = in.has("red");
  if (in.mode() == "warp") {
    expect_count(in, 1, 1);
    if (in.has("sync")) in.run = warp_barrier;
    return;
  }
  if (in.mode() == "cluster") {
    if (in.has("arrive") != in.has("wait")) in.run = in.has("arrive") ? cluster_arrive : cluster_wait;
    return;
  }
  if (in.has("sync") + in.has("arrive") + reduces != 1) return;
  in.detail[0] = in.has("arrive") ? arrive
                 : !reduces       ? sync
                 : in.has("popc") ? reduce_count
                 : in.has("and")  ? reduce_and
                                  : reduce_or;
  in.detail[1] = in.parts[0] == "bar" || in.has("aligned");
  expect_count(in, reduces ? 3 : in.detail[0] == arrive ? 2 : 1, reduces ? 4 : 2);
  in.run = barrier;
}

// --- fences

/// Orders this thread's accesses through the generic proxy before later ones through the async proxy, and back.
Status proxy_fence(Warp& warp, const Instruction&, uint32_t mask) {
  each_lane(warp, mask, [&](int lane) { warp.cta.fences[static_cast<size_t>(warp.thread(lane))] = warp.cta.clock; });
  return Status::next;
}
/// fence.mbarrier_init: this thread's mbarrier.inits come before relaxed arrivals at the cluster's barrier, and before
/// copies.
Status init_fence(Warp& warp, const Instruction&, uint32_t mask) {
  auto agent = static_cast<size_t>(kFirstInitAgent + warp.index);
  warp.fenced.at[agent] = warp.fenced_wide.at[agent] = warp.clock.at[agent];
  each_lane(warp, mask,
            [&](int lane) { warp.cta.init_fences[static_cast<size_t>(warp.thread(lane))] = warp.cta.clock; });
  return Status::next;
}
Status thread_fence(Warp& warp, const Instruction& in, uint32_t) {
  fence(warp, Ordering::from_bits(in.detail[0]));
  return Status::next;
}
Status nothing(Warp&, const Instruction&, uint32_t) { return Status::next; }
void decode_fence(Instruction& in) {
  in.detail[0] = ordering_of(in, false).bits();
  if (in.has("proxy") && !in.has("async") && !in.has("alias") && !in.has("tensormap::generic")) return;
  if (in.has("proxy"))  // fences of other proxies than the async one order nothing that is tracked
    in.run = in.has("async") && !in.has("global") ? proxy_fence : nothing;
  else
    in.run = in.has("mbarrier_init") ? init_fence : thread_fence;
}
void decode_nothing(Instruction& in) { in.run = nothing; }

/// griddepcontrol.wait: the launches before are over, as they always are here; but a launch that may begin early has to
/// say where it needs that.
Status wait_for_grids(Warp& warp, const Instruction&, uint32_t) {
  warp.cta.grid_waits.push_back(warp.epoch());
  return Status::next;
}
/// griddepcontrol.launch_dependents: the next launch may begin. If this one has not waited yet, those before it may
/// still run then.
Status launch_dependents(Warp& warp, const Instruction&, uint32_t) {
  const Launch& launch = warp.cta.launch;
  if (launch.options.early && launch.begins_others && !warp.cta.waited(warp.clock)) *launch.begins_others = true;
  return Status::next;
}
void decode_grid_control(Instruction& in) { in.run = in.has("wait") ? wait_for_grids : launch_dependents; }

// Kernels may mark how far a warp is, for the counters: pmevent 1 begins the work on a KV tile, 2 says that the tile
// needs a mask, 3 ends it. 4 says that the launch runs beside the one before it, and touches nothing that that one
// writes. Markers are no work and are not counted.
enum Marker { tile_begins = 1, tile_is_shell = 2, tile_ends = 3, runs_beside = 4 };

Status mark(Warp& warp, const Instruction& in, uint32_t mask) {
  TileMarks& marks = warp.marks;
  int64_t what = in.args.empty() ? 0 : in.args[0].value;
  if (mask & 1) {  // lane 0 speaks for its warp: lanes that have diverged come here in several groups
    if (what == tile_begins || what == tile_ends) marks.end();
    if (what == tile_begins) marks.begin();
    if (what == tile_is_shell) marks.shell = true;
  }
  if (what == runs_beside) warp.cta.beside = true;
  --marks.executed;  // the scheduler is about to count this one
  --warp.cta.clock;
  return Status::next;
}
void decode_marker(Instruction& in) { in.run = mark; }

Status yield(Warp& warp, const Instruction&, uint32_t) {
  warp.yields = true;
  return Status::next;
}
void decode_nanosleep(Instruction& in) { in.run = yield; }

Status set_registers(Warp& warp, const Instruction& in, uint32_t mask) {
  if (!whole_warp(warp, mask)) return Status::blocked;
  int64_t count = in.args[0].value;
  if (count < 24 || count > 256 || count % 8)
    throw EmulationError("setmaxnreg to " + std::to_string(count) + ", which is not a multiple of 8 in 24..256");
  return Status::next;
}
void decode_setmaxnreg(Instruction& in) {
  expect_count(in, 1, 1);
  in.run = set_registers;
}

}  // namespace

std::vector<Opcode> control_opcodes() {
  return {
      {"bra", "Control Flow: bra", decode_bra, "uni"},
      {"brx", "Control Flow: brx.idx", decode_brx, "idx uni"},
      {"call", "Control Flow: call", decode_call, "uni"},
      {"ret", "Control Flow: ret", decode_leave, "uni"},
      {"exit", "Control Flow: exit", decode_leave},
      {"trap", "Miscellaneous: trap", decode_trap},
      {"brkpt", "Miscellaneous: brkpt", decode_nothing},
      {"pmevent", "Miscellaneous: pmevent", decode_marker},
      {"nanosleep", "Miscellaneous: nanosleep", decode_nanosleep},
      {"setmaxnreg", "Miscellaneous: setmaxnreg", decode_setmaxnreg, "inc dec sync aligned"},
      {"bar", "Parallel Synchronization: bar, bar.warp.sync", decode_barrier, "sync arrive red warp cta and or popc"},
      {"barrier", "Parallel Synchronization: barrier, barrier.cluster", decode_barrier,
       "sync arrive wait red cluster cta aligned relaxed acquire release and or popc"},
      {"fence", "Parallel Synchronization: fence", decode_fence,
       "sc acq_rel acquire release cta cluster gpu sys mbarrier_init proxy alias async global shared::cta "
       "shared::cluster "
       "tensormap::generic"},
      {"membar", "Parallel Synchronization: membar", decode_fence, "cta gl sys proxy alias"},
      {"griddepcontrol", "Parallel Synchronization: griddepcontrol", decode_grid_control, "launch_dependents wait"},
  };
}

}  // namespace gnaforge::emulator
