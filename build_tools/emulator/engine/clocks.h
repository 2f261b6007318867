// Happens-before between the warps of a CTA and its asynchronous engines, as vector clocks.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <string>

namespace gnaforge::emulator {

// Who acts: warps, the tensor core (in order), the wgmmas of each warpgroup, the copies that complete on each mbarrier.
constexpr int kTensorAgent = 32, kFirstWarpgroupAgent = 33, kFirstBarrierAgent = 41, kAgents = 96;

struct Clock {
  std::array<uint32_t, kAgents> at{};
  void join(const Clock& other) {
    for (int i = 0; i < kAgents; ++i) at[static_cast<size_t>(i)] = std::max(at[static_cast<size_t>(i)], other.at[static_cast<size_t>(i)]);
  }
};

/// An access: by whom, and when by that one's own count. Stamp 0 is no access.
struct Epoch {
  uint32_t stamp = 0;
  uint8_t agent = 0;
  bool before(const Clock& observer) const { return observer.at[agent] >= stamp; }
};

/// The last accesses to a piece of memory. Of several readers only the last is kept.
struct Accesses {
  Epoch write, read;
};

std::string name_of_agent(int agent);

}  // namespace gnaforge::emulator
