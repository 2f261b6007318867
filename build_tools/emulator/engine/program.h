// A PTX module after parsing: instructions with resolved operands, ready to run.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "types.h"

namespace gnaforge::emulator {

class Warp;
struct Instruction;

/// What an instruction did: went on, can't go on yet, or set the program counter itself.
enum class Status : uint8_t { next, blocked, jumped };
/// Executes an instruction for the lanes in `mask`.
using Handler = Status (*)(Warp&, const Instruction&, uint32_t mask);

/// An operand. Registers live in a warp's register file as 32 lanes side by side, immediates in the same form here.
struct Operand {
  enum class Kind : uint8_t { reg, immediate, address, vector, sink, label } kind = Kind::sink;
  Type type = Type::none;                       // of the register
  bool negated = false;                         // !p
  uint32_t slot = 0;                            // reg, or an address's base register: byte offset in the register file
  uint32_t reg_index = 0;                       // its number, for checks
  bool has_base = false;                        // address: whether there is a base register
  bool clock = false;                           // reads a register that changes by itself
  int64_t value = 0;                            // immediate, address offset, or a label's instruction
  std::shared_ptr<std::vector<uint8_t>> lanes;  // immediate, broadcast over the lanes
  std::string symbol;                           // name behind a symbol or label
  std::vector<Operand> parts;  // vector elements; what follows the base in [map, {coordinates}]; {d, p} of d|p

  bool is_register() const { return kind == Kind::reg; }
};

struct Instruction {
  Handler run = nullptr;
  bool guarded = false, guard_negated = false;
  uint32_t guard_slot = 0;
  Type type = Type::none, type2 = Type::none;  // the last type suffix, and the one before it
  Space space = Space::generic;
  uint8_t width = 1;       // vector elements of ld and st
  int32_t detail[4] = {};  // what the decoder wants to tell the handler
  uint32_t target = 0;     // of a branch or call
  std::vector<Operand> args;
  std::vector<uint32_t> reads, writes;  // register numbers, predicates left out
  std::vector<std::string> parts;       // the opcode, split at its dots
  std::string text;
  int line = 0;   // in the PTX
  int site = -1;  // of Module::sites

  /// The opcode's first modifier; empty if it has none.
  std::string mode() const { return parts.size() > 1 ? parts[1] : ""; }
  bool has(const char* modifier) const {
    for (const std::string& part : parts)
      if (part == modifier) return true;
    return false;
  }
};

/// A place in the CUDA sources, from .loc. Of a function that was inlined, `caller` is the site of its call.
struct Site {
  int file, line, column;
  int caller = -1;
};

struct Param {
  uint32_t offset, size, align;
};

/// What a kernel needs, together with the functions that it may call. Kernels never run at once, so theirs overlap.
struct Needs {
  struct SpecialRegister {
    std::string name;
    uint32_t slot;
  };
  uint32_t register_bytes = 0, register_count = 0;
  uint32_t local_bytes = 0;
  uint32_t shared_bytes = 0;    // static
  uint32_t dynamic_shared = 0;  // where extern shared memory begins
  bool wgmma = false, tcgen05 = false;
  std::vector<SpecialRegister> specials;
};

struct Function {
  std::string name;
  bool kernel = false;
  uint32_t first = 0;  // its first instruction
  std::vector<Param> params;
  uint32_t param_bytes = 0;
  std::vector<std::string> param_names, return_names;  // of a device function: symbols in the local window
  std::vector<uint32_t> param_sizes, return_sizes;
  int required_threads[3] = {0, 0, 0};  // .reqntid
  Needs needs;                          // of a kernel
};

/// A module-scope variable in global or constant space.
struct Variable {
  std::string name;
  std::shared_ptr<std::vector<uint8_t>> storage;
  uint64_t address = 0, size = 0;
};

struct Module {
  std::string name;
  int target = 0;  // 90 for sm_90a
  std::vector<Instruction> code;
  std::vector<Function> functions;
  std::vector<Variable> variables;
  std::unordered_map<int, std::string> files;
  std::vector<Site> sites;

  const Function* find(const std::string& function) const {
    for (const Function& candidate : functions)
      if (candidate.name == function) return &candidate;
    return nullptr;
  }
  /// "name.ptx:12: opcode ... (header.h:34, called at source.cu:56)"
  std::string place(uint32_t pc) const;
  /// "header.h:34, called at source.cu:56"; empty without -lineinfo.
  std::string source(uint32_t pc) const;
};

/// Parses PTX text. Throws EmulationError with the line.
std::shared_ptr<Module> parse_module(const std::string& text, const std::string& name);

/// Sets the handler of an instruction. Throws if there is none for it.
void decode(Instruction& instruction);

}  // namespace gnaforge::emulator
