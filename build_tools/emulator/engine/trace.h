// What happened last in a CTA, for the report of an error: instructions and synchronisation, warp by warp.
#pragma once
#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "program.h"

namespace gnaforge::emulator {

/// Keeps the last events of each warp, and of work that completed on its own. Texts are made as things happen: a CTA
/// with a trace is slow, one without only tests a pointer, and that at synchronising instructions alone.
class Trace {
 public:
  Trace(const Module& module, size_t warps) : module_(module), actors_(warps + 1) {}

  /// From now on events are of this warp, or, with -1, of asynchronous work.
  void act(int warp) { actor_ = warp; }
  /// After an instruction: `blocked` if it can't go on yet.
  void instruction(int warp, uint32_t pc, uint32_t mask, uint64_t clock, bool blocked);
  /// What the instruction at hand, or asynchronous work, did to a barrier.
  void note(const std::string& text, uint64_t clock);
  /// The end of an error's message.
  std::string report() const;

 private:
  static constexpr size_t kInstructions = 8, kEvents = 12;
  struct Event {
    uint64_t clock;
    int64_t pc;  // -1: none
    uint32_t mask;
    bool blocked;
    std::vector<std::string> notes;
  };
  struct Actor {
    std::deque<std::pair<uint64_t, uint32_t>> instructions;  // clock, pc
    std::deque<Event> events;
  };
  Actor& actor(int warp) { return actors_[static_cast<size_t>(warp + 1)]; }
  static void keep(Actor& actor, Event event);
  std::string line(const Event& event) const;

  const Module& module_;
  std::vector<Actor> actors_;  // asynchronous work first
  int actor_ = -1;
  std::vector<std::string> notes_;  // of the instruction at hand
};

/// Whether others may wait for what the instruction does, or it for others.
bool synchronises(const Instruction& instruction);

}  // namespace gnaforge::emulator
