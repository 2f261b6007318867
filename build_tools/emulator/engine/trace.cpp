#include "trace.h"

#include <unordered_set>

namespace gnaforge::emulator {

bool synchronises(const Instruction& in) {
  static const std::unordered_set<std::string> kNames = {"mbarrier", "bar",  "barrier", "fence",
                                                         "membar",   "exit", "atom",    "red"};
  const std::string& name = in.parts[0];
  if (name == "cp") return true;  // all forms are asynchronous
  if (name == "wgmma") return in.parts[1] != "mma_async";
  if (name == "tcgen05") return in.parts[1] != "mma" && in.parts[1] != "ld" && in.parts[1] != "st";
  return kNames.count(name) > 0;
}

void Trace::keep(Actor& actor, Event event) {
  // A wait is tried again whenever anything happened: only its last try is worth a line.
  if (!actor.events.empty() && actor.events.back().blocked && actor.events.back().pc == event.pc)
    actor.events.pop_back();
  actor.events.push_back(std::move(event));
  if (actor.events.size() > kEvents) actor.events.pop_front();
}

void Trace::instruction(int warp, uint32_t pc, uint32_t mask, uint64_t clock, bool blocked) {
  Actor& of = actor(warp);
  if (!blocked) {
    of.instructions.emplace_back(clock, pc);
    if (of.instructions.size() > kInstructions) of.instructions.pop_front();
  }
  if (synchronises(module_.code[pc]) || !notes_.empty()) keep(of, {clock, pc, mask, blocked, std::move(notes_)});
  notes_.clear();
}

void Trace::note(const std::string& text, uint64_t clock) {
  if (actor_ < 0)
    keep(actor(-1), {clock, -1, 0, false, {text}});
  else if (notes_.empty() || notes_.back() != text)  // lanes that do the same
    notes_.push_back(text);
}

std::string Trace::line(const Event& event) const {
  std::string out = "\n    " + std::to_string(event.clock) + ": ";
  if (event.pc >= 0) {
    out += module_.place(static_cast<uint32_t>(event.pc));
    if (event.mask != ~0u) out += " lanes " + hex(event.mask);
    if (event.blocked) out += ": can't go on";
  }
  for (size_t i = 0; i < event.notes.size(); ++i) out += (i || event.pc >= 0 ? "; " : "") + event.notes[i];
  return out;
}

std::string Trace::report() const {
  std::string out = "\ntrace: the last events; each begins with the number of instructions that the CTA had executed";
  for (size_t i = 0; i < actors_.size(); ++i) {
    const Actor& of = actors_[i];
    if (of.events.empty() && of.instructions.empty()) continue;
    out += i ? "\n  warp " + std::to_string(i - 1) + ", synchronisation:"
             : "\n  asynchronous work that completed on its own:";
    for (const Event& event : of.events) out += line(event);
    if (i == 0) continue;
    out += "\n  warp " + std::to_string(i - 1) + ", last instructions:";
    for (const auto& at : of.instructions) out += "\n    " + std::to_string(at.first) + ": " + module_.place(at.second);
  }
  return out;
}

}  // namespace gnaforge::emulator
