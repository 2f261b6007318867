// What launches that may still run have written: PTX ISA, Parallel Synchronization: griddepcontrol.
#pragma once
#include <bitset>
#include <cstdint>
#include <mutex>
#include <unordered_map>

namespace gnaforge::emulator {

/// Written by launches of which the next one doesn't know that they have ended, unless it waits. Here they all have: so
/// this is what tells a launch what it must not touch before its griddepcontrol.wait.
class RunningWrites {
 public:
  static constexpr uint64_t kPage = 4096, kCell = 4;
  using Cells = std::bitset<kPage / kCell>;
  using Pages = std::unordered_map<uint64_t, Cells>;  // by address / kPage

  /// All launches so far have ended.
  void settle() {
    std::lock_guard<std::mutex> lock(mutex_);
    pages_.clear();
  }

  /// A launch is over that wrote `written`. `beside`: where it lets the next one begin, those before it may still run.
  void add(const Pages& written, bool beside) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!beside) pages_.clear();
    for (const auto& [page, cells] : written) pages_[page] |= cells;
  }

  bool hold(uint64_t address, uint64_t size) const {
    std::lock_guard<std::mutex> lock(mutex_);
    if (pages_.empty()) return false;
    for (uint64_t at = address / kCell * kCell; at < address + size; at += kCell) {
      auto found = pages_.find(at / kPage);
      if (found != pages_.end() && found->second[at % kPage / kCell]) return true;
    }
    return false;
  }

 private:
  mutable std::mutex mutex_;
  Pages pages_;
};

}  // namespace gnaforge::emulator
