// Finds the decoder of an instruction, and lists the registers it touches.
#include <sstream>
#include <unordered_map>
#include <unordered_set>

#include "opcodes.h"

namespace gnaforge::emulator {

namespace {

struct Entry {
  Opcode opcode;
  std::unordered_set<std::string> modifiers;
  std::vector<std::string> prefixes;

  explicit Entry(const Opcode& of) : opcode(of) {
    std::istringstream words(of.modifiers);
    for (std::string word; words >> word;) {
      if (word.back() == '*')
        prefixes.push_back(word.substr(0, word.size() - 1));
      else
        modifiers.insert(word);
    }
  }
  bool knows(const std::string& part) const {
    auto begins = [&](const std::string& prefix) { return part.compare(0, prefix.size(), prefix) == 0; };
    return modifiers.count(part) || type_named(part) != Type::none ||
           std::any_of(prefixes.begin(), prefixes.end(), begins);
  }
  bool knows_all(const Instruction& in) const {
    return std::all_of(in.parts.begin() + 1, in.parts.end(), [&](const std::string& part) { return knows(part); });
  }
};

const std::unordered_multimap<std::string, Entry>& table() {
  static const auto all = [] {
    std::unordered_multimap<std::string, Entry> map;
    for (const auto& family : {integer_opcodes(), logic_opcodes(), float_opcodes(), convert_opcodes(), data_opcodes(),
                               atomic_opcodes(), control_opcodes(), warp_opcodes(), mbarrier_opcodes(), copy_opcodes(),
                               matrix_opcodes(), mma_opcodes(), tcgen05_opcodes(), tcgen05_copy_opcodes()})
      for (const Opcode& opcode : family) map.emplace(opcode.name, Entry(opcode));
    return map;
  }();
  return all;
}

/// Whether the first operand is written. Matrix accumulators are tracked by their own rules.
bool writes_first(const Instruction& in) {
  static const std::unordered_set<std::string> kNever = {"st",       "red",           "bar",       "barrier",
                                                         "cp",       "fence",         "membar",    "prefetch",
                                                         "bra",      "brx",           "call",      "ret",
                                                         "exit",     "trap",          "st",        "stmatrix",
                                                         "wgmma",    "setmaxnreg",    "nanosleep", "griddepcontrol",
                                                         "discard",  "applypriority", "prefetchu", "stackrestore",
                                                         "multimem", "brkpt",         "pmevent"};
  const std::string& name = in.parts[0];
  if (name == "tcgen05") return in.parts[1] == "ld";
  if (name == "mbarrier") return !in.args.empty() && in.args[0].kind != Operand::Kind::address;
  if (name == "bar" || name == "barrier") return in.has("red");
  return !kNever.count(name);
}

/// Says what it is that no entry of the opcode has.
template <class Entries>
[[noreturn]] void refuse(const Instruction& in, Entries first, Entries last) {
  std::string section = in.parts[0] + " (PTX ISA: " + first->second.opcode.section + ")";
  for (size_t i = 1; i < in.parts.size(); ++i)
    if (std::none_of(first, last, [&](const auto& entry) { return entry.second.knows(in.parts[i]); }))
      throw EmulationError("the modifier ." + in.parts[i] + " of " + section +
                           " is unknown or not emulated: " + in.text);
  throw EmulationError("this form of " + section + " is not emulated: " + in.text);
}

void collect(const Operand& op, std::vector<uint32_t>& out) {
  if (op.kind == Operand::Kind::reg && op.type != Type::pred && op.symbol.empty()) out.push_back(op.reg_index);
  if (op.kind == Operand::Kind::address && op.has_base) out.push_back(op.reg_index);
  for (const Operand& part : op.parts) collect(part, out);
}

}  // namespace

void expect_count(const Instruction& in, size_t least, size_t most) {
  if (in.args.size() < least || in.args.size() > most)
    throw EmulationError(std::to_string(in.args.size()) + " operands, expected " + std::to_string(least) +
                         (most > least ? " to " + std::to_string(most) : "") + ": " + in.text);
}

void expect_sizes(const Instruction& in, std::initializer_list<int> sizes) {
  size_t i = 0;
  for (int size : sizes) {
    if (i >= in.args.size()) return;
    const Operand& op = in.args[i++];
    if (op.is_register() && size >= 0 && size_of(op.type) != size)
      throw EmulationError("operand " + std::to_string(i) + " has " + std::to_string(8 * size_of(op.type)) +
                           " bits, expected " + std::to_string(8 * size) + ": " + in.text);
    if (op.kind != Operand::Kind::reg && op.kind != Operand::Kind::immediate &&
        !(i == 1 && op.kind == Operand::Kind::sink) && size >= 0)
      throw EmulationError("operand " + std::to_string(i) + " is neither register nor constant: " + in.text);
  }
}

Space space_of(const Instruction& in) {
  for (const std::string& part : in.parts) {
    if (part == "global") return Space::global;
    if (part.compare(0, 6, "shared") == 0) return Space::shared;
    if (part == "local") return Space::local;
    if (part.compare(0, 5, "param") == 0) return Space::param;
    if (part == "const") return Space::constant;
  }
  return Space::generic;
}

void decode(Instruction& in) {
  in.space = space_of(in);
  auto range = table().equal_range(in.parts[0]);
  if (range.first == range.second) throw EmulationError("unknown opcode: " + in.text);
  for (auto entry = range.first; entry != range.second && !in.run; ++entry)
    if (entry->second.knows_all(in)) entry->second.opcode.decode(in);
  if (!in.run) refuse(in, range.first, range.second);
  bool writes = writes_first(in);
  for (size_t i = 0; i < in.args.size(); ++i) {
    if (in.parts[0] == "wgmma" && i <= 1) continue;  // accumulators and A have rules of their own
    collect(in.args[i], i == 0 && writes && in.args[i].kind != Operand::Kind::address ? in.writes : in.reads);
  }
}

}  // namespace gnaforge::emulator
