#include "warp.h"

#include "cta.h"
#include "matrix.h"
#include "recording.h"

namespace gnaforge::emulator {

namespace {
constexpr uint64_t kFairShare = 4096;  // instructions before another group of a warp gets its turn
}

Warp::Warp(Cta& owner, int index_, uint32_t alive_)
    : cta(owner), index(index_), alive(alive_), calls(kWarpSize), local(size_t{kWarpSize} * owner.needs.local_bytes) {
  groups.push_back({owner.launch.function->first, alive_, kRunnable, 0});
  uint32_t bytes = owner.needs.register_bytes;
  clock.at[static_cast<size_t>(index)] = 1;
  tensor_clock.at[tensor_agent()] = ~0u;  // its own accesses need no fence
  storage_ = std::make_unique<uint8_t[]>(bytes + 64);
  registers_ = storage_.get() + (64 - reinterpret_cast<uintptr_t>(storage_.get()) % 64) % 64;
  std::memset(registers_, 0xfb, bytes);  // a NaN pattern: registers don't start as zero
}

Warp::~Warp() = default;

uint64_t Warp::bits(const Operand& op, int i) const {
  if (op.kind == Operand::Kind::immediate) return static_cast<uint64_t>(op.value);
  switch (size_of(op.type)) {
    case 0: return predicate(op) >> i & 1;
    case 1: return in<uint8_t>(op)[i];
    case 2: return in<uint16_t>(op)[i];
    case 4: return in<uint32_t>(op)[i];
    default: return in<uint64_t>(op)[i];
  }
}

void Warp::put_bits(const Operand& op, int i, uint64_t value) {
  if (op.kind == Operand::Kind::sink) return;
  switch (size_of(op.type)) {
    case 0: return put_predicate(op, 1u << i, value ? ~0u : 0u);
    case 1: out<uint8_t>(op)[i] = static_cast<uint8_t>(value); return;
    case 2: out<uint16_t>(op)[i] = static_cast<uint16_t>(value); return;
    case 4: out<uint32_t>(op)[i] = static_cast<uint32_t>(value); return;
    default: out<uint64_t>(op)[i] = value; return;
  }
}

uint32_t Warp::uniform(const Operand& op, uint32_t mask, const char* what) const {
  int first = __builtin_ctz(mask);
  uint32_t value = static_cast<uint32_t>(bits(op, first));
  if (op.kind != Operand::Kind::immediate)
    for (uint32_t rest = mask & (mask - 1); rest; rest &= rest - 1)
      if (static_cast<uint32_t>(bits(op, __builtin_ctz(rest))) != value)
        throw EmulationError(std::string(what) + " differs between the lanes of a warp");
  return value;
}

bool Warp::choose() {
  auto runnable = [&](const Group& g) { return g.blocked_at == kRunnable || g.blocked_at != cta.events; };
  if (groups.size() == 1) {
    current = 0;
    return runnable(groups[0]);
  }
  size_t best = groups.size(), count = 0;
  for (size_t i = 0; i < groups.size(); ++i) {
    if (!runnable(groups[i])) continue;
    ++count;
    // The lowest program counter first: in structured code, that is how lanes meet again.
    if (best == groups.size() || groups[i].pc < groups[best].pc) best = i;
  }
  if (count == 0) return false;
  bool shuffle = cta.launch.options.order == Order::random && cta.random() % 16 == 0;
  if (count > 1 && (shuffle || cta.clock / kFairShare % 4 == 3)) {
    // The lowest may spin until a higher one has moved.
    size_t pick = cta.random() % count;
    for (best = 0;; ++best)
      if (runnable(groups[best]) && pick-- == 0) break;
  }
  current = best;
  return true;
}

void Warp::merge() {
  Group& mine = groups[current];
  for (size_t i = groups.size(); i-- > 0;) {
    if (i == current || groups[i].pc != mine.pc || groups[i].token != mine.token) continue;
    mine.mask |= groups[i].mask;
    mine.blocked_at = kRunnable;
    groups.erase(groups.begin() + static_cast<std::ptrdiff_t>(i));
    return;  // there was at most one
  }
}

void Warp::jump(uint32_t mask, uint32_t target) {
  Group& from = groups[current];
  if (mask == from.mask) {
    from.pc = target;
  } else {
    from.mask &= ~mask;
    ++from.pc;
    merge();
    groups.push_back({target, mask, kRunnable, 0});
    current = groups.size() - 1;
  }
}

void Warp::exit(uint32_t mask) {
  Group& from = groups[current];
  from.mask &= ~mask;
  alive &= ~mask;
  cta.exited += static_cast<uint32_t>(__builtin_popcount(mask));
  if (from.mask) {
    ++from.pc;
  } else {
    groups.erase(groups.begin() + static_cast<std::ptrdiff_t>(current));
    current = 0;
  }
  for (Group& group : groups) group.blocked_at = kRunnable;  // who waits for these lanes need not any more
  cta.event();
}

uint64_t Warp::run(uint64_t budget) { return cta.trace ? run_as<true>(budget) : run_as<false>(budget); }

template <bool Traced>
uint64_t Warp::run_as(uint64_t budget) {
  const Instruction* code = cta.module.code.data();
  uint64_t* executed = cta.counters.executed.data();
  uint64_t done = 0;
  yields = false;
  while (done < budget && !yields && alive) {
    if (!choose()) {
      stalled_at = cta.events;
      break;
    }
    Group* at = &groups[current];
    const Instruction& instruction = code[at->pc];
    uint32_t mask = at->mask;
    if (instruction.guarded) {
      uint32_t guard;
      std::memcpy(&guard, registers_ + instruction.guard_slot, 4);
      mask &= instruction.guard_negated ? ~guard : guard;
    }
    if (mask) {
      lane = __builtin_ctz(mask);
      passed = 0;
      if (matrix) matrix->check(instruction);
      ++cta.clock;
      uint32_t pc = at->pc;
      if (recorder) recorder->warp = static_cast<uint32_t>(index), recorder->instruction = pc;
      if (Traced) cta.trace->act(index);
      Status status = instruction.run(*this, instruction, mask);
      if (Traced) {
        cta.trace->instruction(index, pc, mask, cta.clock, status == Status::blocked);
        cta.trace->act(-1);
      }
      if (status == Status::blocked) {
        --cta.clock;
        at = &groups[current];
        uint32_t onward = passed | (at->mask & ~mask);
        at->mask &= ~onward;
        if (at->mask) {
          at->blocked_at = cta.events;
          if (onward) {
            groups.push_back({at->pc + 1, onward, kRunnable, 0});
            current = groups.size() - 1;
            merge();
          }
          continue;
        }
        at->mask = onward;
        at->token = 0;
        status = Status::next;
      }
      ++executed[pc];
      note(Event::execute, 0, mask);
      ++marks.executed;
      ++done;
      if (status == Status::jumped) {
        if (groups.size() > 1) merge();
        continue;
      }
      at = &groups[current];
      at->blocked_at = kRunnable;
    }
    ++at->pc;
    if (groups.size() > 1) merge();
  }
  return done;
}

}  // namespace gnaforge::emulator
