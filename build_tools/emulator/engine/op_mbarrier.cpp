// PTX ISA: Parallel Synchronization and Communication Instructions: mbarrier.
#include "opcodes.h"

namespace gnaforge::emulator {
namespace {

// What mbarrier.arrive returns: opaque to programs, phase above pending count here.
uint64_t state_of(const Mbarrier& barrier) { return barrier.phase << 32 | static_cast<uint64_t>(barrier.pending); }

uint32_t barrier_address(Warp& warp, const Instruction& in, const Operand& op, int lane) {
  return warp.cta.shared_address(in.space, warp.address(op, lane));
}

Status init(Warp& warp, const Instruction& in, uint32_t mask) {
  each_lane(warp, mask, [&](int lane) {
    uint32_t address = barrier_address(warp, in, in.args[0], lane);
    warp.cta.mbarriers.init(address, static_cast<uint32_t>(warp.bits(in.args[1], lane)), warp);
    note(Event::init, address, warp.bits(in.args[1], lane));
    warp.cta.mbarriers.at(address).init_pc = warp.group().pc;
    warp.cta.shared.set_object(address, true);
  });
  return Status::next;
}

Status invalidate(Warp& warp, const Instruction& in, uint32_t mask) {
  each_lane(warp, mask, [&](int lane) {
    uint32_t address = barrier_address(warp, in, in.args[0], lane);
    warp.cta.mbarriers.invalidate(address);
    warp.cta.shared.set_object(address, false);
  });
  return Status::next;
}

/// detail: 0 kExpects and kRelaxed, 1 whether drop, 2 whether noComplete, 3 the address operand.
constexpr int kExpects = 1, kRelaxed = 2;
Status arrive(Warp& warp, const Instruction& in, uint32_t mask) {
  Cta& cta = warp.cta;
  auto at = static_cast<size_t>(in.detail[3]);
  // .release by default. Relaxed, only what an earlier fence has ordered goes along.
  Clock seen = in.detail[0] & kRelaxed ? warp.fenced : warp.publish();
  each_lane(warp, mask, [&](int lane) {
    uint32_t address = barrier_address(warp, in, in.args[at], lane);
    Mbarrier& barrier = cta.mbarriers.used_by(address, warp);
    uint64_t state = state_of(barrier);
    barrier.arrivers |= uint64_t{1} << warp.index;
    barrier.last_warp = warp.index;
    barrier.last_arrival = warp.group().pc;
    uint32_t count = 1;
    if (in.args.size() > at + 1) {
      auto value = static_cast<uint32_t>(warp.bits(in.args[at + 1], lane));
      if (in.detail[0] & kExpects) {
        note(Event::expect, address, state >> 32);
        if (cta.mbarriers.expect(address, value)) cta.event();
      } else {
        count = value;
      }
    }
    if (in.detail[2] && cta.mbarriers.at(address).pending <= count)
      throw EmulationError("arrive.noComplete would complete the phase of " + cta.mbarriers.describe(address));
    note(Event::arrive, address, state >> 32);
    if (cta.mbarriers.arrive(address, count, seen, in.detail[1])) cta.event();
    if (at == 1) warp.put_bits(in.args[0], lane, state);
  });
  return Status::next;
}

Status transactions(Warp& warp, const Instruction& in, uint32_t mask) {
  each_lane(warp, mask, [&](int lane) {
    uint32_t address = barrier_address(warp, in, in.args[0], lane);
    warp.cta.mbarriers.used_by(address, warp);
    auto bytes = static_cast<int64_t>(static_cast<uint32_t>(warp.bits(in.args[1], lane)));
    note(in.detail[0] ? Event::expect : Event::complete, address, warp.cta.mbarriers.at(address).phase);
    if (in.detail[0]) {
      if (warp.cta.mbarriers.expect(address, bytes)) warp.cta.event();
    } else if (warp.cta.mbarriers.complete(address, bytes, warp.fenced)) {
      warp.cta.event();
    }
  });
  return Status::next;
}

/// detail: 0 whether try_wait (which may block), 1 whether by parity, 2 whether relaxed.
Status wait(Warp& warp, const Instruction& in, uint32_t mask) {
  Cta& cta = warp.cta;
  uint32_t complete = 0;
  uint64_t before = warp.group().token, oldest = 0;
  uint32_t first = barrier_address(warp, in, in.args[1], warp.lane);
  bool one_barrier = true;
  each_lane(warp, mask, [&](int lane) {
    uint32_t address = barrier_address(warp, in, in.args[1], lane);
    one_barrier &= address == first;
    const Mbarrier& barrier = cta.mbarriers.used_by(address, warp);
    uint64_t wanted = warp.bits(in.args[2], lane);
    bool done;
    if (in.detail[1]) {
      if (wanted > 1) throw EmulationError("phase parity " + std::to_string(wanted) + " is neither 0 nor 1");
      done = (barrier.phase & 1) != wanted;
      if (!done && before && barrier.phase + 1 >= before + 2)
        throw EmulationError("overrun: while this thread waited for one phase, two ended at " +
                             cta.mbarriers.describe(address));
      oldest = barrier.phase + 1;
    } else {
      uint64_t phase = wanted >> 32;
      if (barrier.phase > phase + 1)
        throw EmulationError("the state is older than the previous phase of " + cta.mbarriers.describe(address));
      done = barrier.phase != phase;
    }
    complete |= uint32_t{done} << lane;
    note(done ? Event::wait_done : Event::wait_open, address, done ? barrier.phase - 1 : barrier.phase);
    if (done) (in.detail[2] ? warp.observed : warp.clock).join(barrier.published);
  });
  uint32_t open = mask & ~complete;
  if (open) ++cta.counters.waited[warp.group().pc];
  // try_wait may also give up at any time, and does where nothing else is left to happen.
  bool stuck = cta.events == cta.give_up && warp.group().blocked_at != kRunnable;
  bool gives_up = !in.detail[0] || stuck || (cta.timing() != Timing::eager && cta.chance(0.1));
  if (open && gives_up) {
    warp.put_predicate(in.args[0], mask, complete);
    warp.yields = true;
    warp.group().token = 0;
    return Status::next;
  }
  warp.put_predicate(in.args[0], complete, ~0u);
  if (!open) {
    warp.group().token = 0;
    return Status::next;
  }
  warp.passed = complete;
  if (!complete) warp.group().token = one_barrier ? oldest : 0;
  return Status::blocked;
}

Status pending_count(Warp& warp, const Instruction& in, uint32_t mask) {
  each_lane(warp, mask, [&](int lane) { warp.put_bits(in.args[0], lane, warp.bits(in.args[1], lane) & 0xffffffffu); });
  return Status::next;
}

void decode_mbarrier(Instruction& in) {
  const std::string what = in.mode();
  if (what == "init") {
    expect_count(in, 2, 2);
    in.run = init;
  } else if (what == "inval") {
    expect_count(in, 1, 1);
    in.run = invalidate;
  } else if (what == "arrive" || what == "arrive_drop") {
    expect_count(in, 1, 3);
    in.detail[0] = (in.has("expect_tx") ? kExpects : 0) | (in.has("relaxed") ? kRelaxed : 0);
    in.detail[1] = what == "arrive_drop";
    in.detail[2] = in.has("noComplete");
    in.detail[3] = in.args[0].kind == Operand::Kind::address ? 0 : 1;
    in.run = arrive;
  } else if (what == "expect_tx" || what == "complete_tx") {
    expect_count(in, 2, 2);
    in.detail[0] = what == "expect_tx";
    in.run = transactions;
  } else if (what == "try_wait" || what == "test_wait") {
    expect_count(in, 3, 4);
    in.detail[0] = what == "try_wait";
    in.detail[1] = in.has("parity");
    in.detail[2] = in.has("relaxed");
    in.run = wait;
  } else if (what == "pending_count") {
    expect_count(in, 2, 2);
    in.run = pending_count;
  }
}

}  // namespace

std::vector<Opcode> mbarrier_opcodes() {
  return {{"mbarrier", "Parallel Synchronization: mbarrier", decode_mbarrier,
           "init inval arrive arrive_drop expect_tx complete_tx try_wait test_wait pending_count parity noComplete "
           "relaxed acquire release cta cluster shared shared::cta shared::cluster"}};
}

}  // namespace gnaforge::emulator
