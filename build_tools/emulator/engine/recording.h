// A recording of what a launch did that matters to synchronisation, for those who reason about a kernel's own rules.
#pragma once
#include <cstdint>
#include <vector>

namespace gnaforge::emulator {

/// What happened, with what `address` and `value` mean; mirrored in Python.
enum class Event : uint32_t {
  cta,      // a CTA begins: -, -
  execute,  // after whatever the instruction did: -, lanes
  read,     // shared memory through the generic proxy: address, bytes
  write,
  async_read,  // shared memory through the async proxy, from now on: address, bytes
  async_write,
  landed,       // such a write ended: address, bytes
  tensor_read,  // tensor memory: quarter of the lanes << 16 | column, columns
  tensor_write,
  init,       // mbarrier, arrivals per phase
  arrive,     // mbarrier, phase; also by tcgen05.commit
  expect,     // mbarrier, phase
  complete,   // a copy's bytes are there: mbarrier, phase
  wait_open,  // a wait found the phase open: mbarrier, phase
  wait_done,  // a wait found the phase complete: mbarrier, phase
  barrier,    // a warp enters: number, how often it was released before
};

struct Record {
  Event event;
  uint32_t warp, instruction, address;
  uint64_t value;
};

/// What launches of this thread record, if anything. `warp` and `instruction` are being executed.
struct Recorder {
  std::vector<Record> records;
  uint32_t warp = 0, instruction = 0;
};
inline thread_local Recorder* recorder = nullptr;

inline void note(Event event, uint32_t address, uint64_t value) {
  if (recorder) recorder->records.push_back({event, recorder->warp, recorder->instruction, address, value});
}

}  // namespace gnaforge::emulator
