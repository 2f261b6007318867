#include "api.h"

#include <cstdio>
#include <cstring>
#include <map>

#include "launch.h"
#include "tensor_map.h"
#include "recording.h"

using namespace gnaforge::emulator;

namespace {

thread_local std::string last_error, last_text;

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) >= 32) out += c;
  }
  return out + "\"";
}

std::string opcode_of(const Instruction& instruction) {
  std::string opcode;
  for (const std::string& part : instruction.parts) opcode += (opcode.empty() ? "" : ".") + part;
  return opcode;
}

/// Runs f; an exception becomes the last error.
template <class F>
int guarded(F&& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 1;
  }
}

thread_local Recorder recording;

using ModuleHandle = std::shared_ptr<Module>;

}  // namespace

const char* gnaforge_emulator_error() { return last_error.c_str(); }

void* gnaforge_emulator_module(const char* text, const char* name) {
  ModuleHandle* handle = nullptr;
  guarded([&] { handle = new ModuleHandle(parse_module(text, name)); });
  return handle;
}

void gnaforge_emulator_module_free(void* module) { delete static_cast<ModuleHandle*>(module); }

const char* gnaforge_emulator_describe(void* handle) {
  const Module& module = **static_cast<ModuleHandle*>(handle);
  std::string out = "{\"target\":" + std::to_string(module.target) + ",\"kernels\":[";
  bool first = true;
  for (const Function& f : module.functions) {
    if (!f.kernel) continue;
    out += std::string(first ? "" : ",") + "{\"name\":" + quoted(f.name) +
           ",\"bytes\":" + std::to_string(f.param_bytes) + ",\"params\":[";
    first = false;
    for (size_t i = 0; i < f.params.size(); ++i)
      out += std::string(i ? "," : "") + "[" + std::to_string(f.params[i].offset) + "," +
             std::to_string(f.params[i].size) + "]";
    out += "]}";
  }
  out += "],\"instructions\":[";
  for (size_t i = 0; i < module.code.size(); ++i) {
    out += std::string(i ? "," : "") + "[" + std::to_string(module.code[i].line) + "," +
           quoted(opcode_of(module.code[i])) + "]";
  }
  last_text = out + "]}";
  return last_text.c_str();
}

const char* gnaforge_emulator_opcode_counts(void* handle, const uint64_t* executed) {
  const Module& module = **static_cast<ModuleHandle*>(handle);
  std::map<std::string, uint64_t> counts;
  for (size_t i = 0; i < module.code.size(); ++i)
    if (executed[i] && module.code[i].parts[0] != "pmevent") counts[opcode_of(module.code[i])] += executed[i];
  last_text.clear();
  for (const auto& entry : counts)
    last_text += (last_text.empty() ? "{" : ",") + quoted(entry.first) + ":" + std::to_string(entry.second);
  last_text += last_text.empty() ? "{}" : "}";
  return last_text.c_str();
}

uint64_t gnaforge_emulator_instructions(void* module) { return (*static_cast<ModuleHandle*>(module))->code.size(); }

int gnaforge_emulator_params(void* module, const char* kernel, uint32_t* bytes) {
  const Function* f = (*static_cast<ModuleHandle*>(module))->find(kernel);
  if (!f || !f->kernel) return -1;
  *bytes = f->param_bytes;
  return static_cast<int>(f->params.size());
}

void gnaforge_emulator_param(void* module, const char* kernel, int index, uint32_t* offset, uint32_t* size) {
  const Param& param = (*static_cast<ModuleHandle*>(module))->find(kernel)->params.at(static_cast<size_t>(index));
  *offset = param.offset;
  *size = param.size;
}

uint64_t gnaforge_emulator_variable(void* module, const char* name, uint64_t* size) {
  for (const Variable& variable : (*static_cast<ModuleHandle*>(module))->variables)
    if (variable.name == name) {
      *size = variable.size;
      return variable.address;
    }
  return 0;
}

void* gnaforge_emulator_memory() { return new DeviceMemory; }
void gnaforge_emulator_memory_free(void* memory) { delete static_cast<DeviceMemory*>(memory); }
void gnaforge_emulator_memory_add(void* memory, uint64_t address, uint64_t size, const char* name) {
  static_cast<DeviceMemory*>(memory)->add(address, size, name);
}
void gnaforge_emulator_memory_remove(void* memory, uint64_t address) {
  static_cast<DeviceMemory*>(memory)->remove(address);
}
void gnaforge_emulator_memory_allow_mapped(void* memory) { static_cast<DeviceMemory*>(memory)->allow_mapped(); }
void gnaforge_emulator_memory_settle(void* memory) { static_cast<DeviceMemory*>(memory)->running->settle(); }

int gnaforge_emulator_launch(void* module, const char* kernel, const GnaforgeEmulatorLaunch* how, const void* params,
                             uint64_t param_bytes, void* memory, GnaforgeEmulatorCounters* counted, uint64_t* executed,
                             uint64_t* waited) {
  return guarded([&] {
    Launch launch;
    launch.module = *static_cast<ModuleHandle*>(module);
    launch.function = launch.module->find(kernel);
    if (!launch.function || !launch.function->kernel)
      throw EmulationError(launch.module->name + " has no kernel " + kernel);
    std::memcpy(launch.grid, how->grid, sizeof launch.grid);
    std::memcpy(launch.block, how->block, sizeof launch.block);
    launch.dynamic_shared = how->dynamic_shared;
    const auto* bytes = static_cast<const uint8_t*>(params);
    launch.params.assign(bytes, bytes + param_bytes);
    launch.memory = static_cast<DeviceMemory*>(memory);
    launch.options = {static_cast<Timing>(how->timing),
                      static_cast<Order>(how->order),
                      how->seed,
                      how->patience,
                      how->relaxed_warpgroups != 0,
                      how->relaxed_tensor_frees != 0,
                      how->trace != 0,
                      how->relaxed_tensor_waits != 0,
                      how->unchecked == 0,
                      how->early != 0,
                      how->relaxed_tensor_fences != 0};
    launch.print = [](const std::string& text) {
      std::fputs(text.c_str(), stdout);
      std::fflush(stdout);
    };
    Counters counters;
    run_launch(launch, how->host_threads, counters);
    if (counted)
      *counted = {counters.instructions,  counters.async_load_bytes,     counters.async_store_bytes,
                  counters.load_bytes,    counters.store_bytes,          counters.tiles[0],
                  counters.tiles[1],      counters.tile_instructions[0], counters.tile_instructions[1],
                  counters.mma_operations};
    if (executed) std::copy(counters.executed.begin(), counters.executed.end(), executed);
    if (waited) std::copy(counters.waited.begin(), counters.waited.end(), waited);
  });
}

void gnaforge_emulator_record(int on) {
  if (on) recording.records.clear();
  recorder = on ? &recording : nullptr;
}

const void* gnaforge_emulator_records(uint64_t* count) {
  *count = recording.records.size();
  return recording.records.data();
}

int gnaforge_emulator_tensor_map(void* out, uint32_t data_type, uint32_t rank, uint64_t address, const uint64_t* dims,
                                 const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                                 uint32_t interleave, uint32_t swizzle, uint32_t promotion, uint32_t fill) {
  return guarded([&] {
    if (rank < 1 || rank > kMaxRank) throw EmulationError("rank " + std::to_string(rank) + " is not in 1..5");
    TensorMap map;
    map.data_type = data_type;
    map.rank = rank;
    map.address = address;
    for (uint32_t i = 0; i < rank; ++i) {
      map.dims[i] = dims[i];
      map.strides[i] = i > 0 ? strides[i - 1] : 0;
      map.box[i] = box[i];
      map.element_strides[i] = element_strides[i];
    }
    map.interleave = interleave;
    map.swizzle = swizzle;
    map.l2_promotion = promotion;
    map.fill_nan = fill;
    std::string broken = encode_tensor_map(out, map);
    if (!broken.empty()) throw EmulationError(broken);
  });
}
