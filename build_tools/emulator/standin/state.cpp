#include "state.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>

namespace gnaforge::standin {

namespace {

constexpr Device kDevices[] = {
    {"NVIDIA H100 (emulated)", 9, 0, 132, uint64_t{80} << 30},
    {"NVIDIA H200 (emulated)", 9, 0, 132, uint64_t{141} << 30},
    {"NVIDIA B200 (emulated)", 10, 0, 148, uint64_t{180} << 30},
};
constexpr uint64_t kRedZone = 4096;
constexpr size_t kMostLaunches = 10'000;  // remembered

/// A string of JSON.
std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (c == '\n')
      out += "\\n";
    else if (static_cast<unsigned char>(c) >= 32)
      out += c;
  }
  return out + "\"";
}

std::string setting(const char* name, const char* otherwise) {
  const char* value = std::getenv((std::string("GNAFORGE_EMULATOR_") + name).c_str());
  return value && *value ? value : otherwise;
}

uint32_t choice(const char* name, std::initializer_list<const char*> choices) {
  std::string value = setting(name, *choices.begin());
  uint32_t index = 0;
  for (const char* candidate : choices) {
    if (value == candidate) return index;
    ++index;
  }
  std::fprintf(stderr, "gnaforge emulator: GNAFORGE_EMULATOR_%s is '%s'; choices:", name, value.c_str());
  for (const char* candidate : choices) std::fprintf(stderr, " %s", candidate);
  std::fprintf(stderr, "\n");
  std::abort();
}

/// What is between commas.
std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> items;
  for (size_t start = 0; start < list.size();) {
    size_t comma = std::min(list.find(',', start), list.size());
    if (comma > start) items.push_back(list.substr(start, comma - start));
    start = comma + 1;
  }
  return items;
}

Settings read_settings() {
  Settings settings{};
  settings.device = kDevices[choice("DEVICE", {"h100", "h200", "b200"})];
  if (int processors = std::atoi(setting("PROCESSORS", "0").c_str()); processors > 0)
    settings.device.processors = processors;
  settings.launch.timing = choice("TIMING", {"eager", "lazy", "random"});
  settings.launch.order = choice("ORDER", {"round-robin", "depth-first", "random"});
  settings.launch.seed = std::strtoull(setting("SEED", "0").c_str(), nullptr, 10);
  settings.launch.host_threads = static_cast<uint32_t>(std::strtoul(setting("HOST_THREADS", "1").c_str(), nullptr, 10));
  settings.launch.relaxed_warpgroups = setting("RELAXED_WARPGROUPS", "0") != "0";
  settings.launch.relaxed_tensor_frees = setting("RELAXED_TENSOR_FREES", "0") != "0";
  settings.launch.relaxed_tensor_waits = setting("RELAXED_TENSOR_WAITS", "0") != "0";
  settings.launch.relaxed_tensor_fences = setting("RELAXED_TENSOR_FENCES", "0") != "0";
  settings.launch.unchecked = setting("CHECKS", "1") == "0";
  settings.launch.patience = std::strtoull(setting("PATIENCE", "20000000").c_str(), nullptr, 10);
  settings.trace = setting("TRACE", "0") != "0";
  settings.keep = setting("KEEP", "");
  settings.unchecked = split(setting("UNCHECKED", ""));
  settings.launch.trace = settings.trace;
  settings.counters = setting("COUNTERS", "");
  return settings;
}

struct FatBinaryWrapper {
  int magic, version;
  const unsigned char* data;
  const void* more;
};
struct FatBinaryHeader {
  uint32_t magic;
  uint16_t version, header_bytes;
  uint64_t bytes;
};

/// The PTX texts in a fat binary that was made with --no-compress: each starts a line with ".version".
std::vector<std::string> texts_in(const void* wrapper) {
  const unsigned char* data = static_cast<const FatBinaryWrapper*>(wrapper)->data;
  FatBinaryHeader header;
  std::memcpy(&header, data, sizeof header);
  const char* at = reinterpret_cast<const char*>(data) + header.header_bytes;
  const char* end = at + header.bytes;
  std::vector<std::string> texts;
  const std::string mark = "\n.version ";
  while (at < end) {
    const void* found = memmem(at, static_cast<size_t>(end - at), mark.data(), mark.size());
    if (!found) break;
    const char* start = static_cast<const char*>(found);
    size_t length = strnlen(start, static_cast<size_t>(end - start));
    texts.emplace_back(start, length);
    at = start + length;
  }
  return texts;
}

}  // namespace

State& State::get() {
  static State* state = new State;  // outlives static destructors, which still unregister binaries
  return *state;
}

State::State() : settings(read_settings()), ranges(gnaforge_emulator_memory()) {
  if (setting("MEMORY", "announced") == "mapped") gnaforge_emulator_memory_allow_mapped(ranges);
}

FatBinary* State::add_binary(const void* wrapper) {
  auto* binary = new FatBinary;
  binary->texts = texts_in(wrapper);
  return binary;
}

void* State::module_of(FatBinary& binary) {
  if (binary.module) return binary.module;
  std::string wanted = ".target sm_" + std::to_string(settings.device.major * 10 + settings.device.minor);
  const std::string* chosen = nullptr;
  for (const std::string& text : binary.texts)
    if (text.find(wanted) != std::string::npos) chosen = &text;
  if (!chosen) {
    fail(cudaErrorNoKernelImageForDevice,
         "no PTX for " + std::string(settings.device.name) + " among " + std::to_string(binary.texts.size()) +
             " texts: compile with -gencode arch=compute_90a,code=[sm_90a,compute_90a] (or 100a) and --no-compress");
    return nullptr;
  }
  binary.module = gnaforge_emulator_module(chosen->c_str(), "ptx");
  if (!binary.module) fail(cudaErrorInvalidPtx, gnaforge_emulator_error());
  return binary.module;
}

Kernel* State::find(const void* host_function) {
  auto found = kernels.find(host_function);
  return found == kernels.end() ? nullptr : &found->second;
}

cudaError_t State::allocate(void** out, size_t size) {
  if (!out) return fail(cudaErrorInvalidValue);
  *out = nullptr;
  if (size == 0) return cudaSuccess;
  if (size > settings.device.memory) return fail(cudaErrorMemoryAllocation);
  std::vector<uint8_t> block(size + 2 * kRedZone + 512, 0xcb);
  uint64_t address = (reinterpret_cast<uint64_t>(block.data()) + kRedZone + 511) / 512 * 512;
  gnaforge_emulator_memory_add(ranges, address, size, "device memory");
  memory.emplace(address, std::move(block));
  *out = reinterpret_cast<void*>(address);
  return cudaSuccess;
}

cudaError_t State::release(void* pointer) {
  if (!pointer) return cudaSuccess;
  auto found = memory.find(reinterpret_cast<uint64_t>(pointer));
  if (found == memory.end()) return fail(cudaErrorInvalidValue);
  gnaforge_emulator_memory_remove(ranges, found->first);
  memory.erase(found);
  return cudaSuccess;
}

cudaError_t State::launch(Kernel& kernel, dim3 grid, dim3 block, void** arguments, size_t shared, bool early) {
  if (sticky_ != cudaSuccess) return sticky_;
  void* module = module_of(*kernel.binary);
  if (!module) return peek_error();
  if (shared > static_cast<size_t>(kernel.dynamic_shared_limit))
    return fail(cudaErrorInvalidValue, kernel.name + ": " + std::to_string(shared) +
                                           " bytes of dynamic shared memory exceed " +
                                           std::to_string(kernel.dynamic_shared_limit) +
                                           "; cudaFuncAttributeMaxDynamicSharedMemorySize raises the limit");
  uint32_t bytes = 0;
  int count = gnaforge_emulator_params(module, kernel.name.c_str(), &bytes);
  if (count < 0) return fail(cudaErrorInvalidDeviceFunction, "the PTX has no kernel " + kernel.name);
  std::vector<uint8_t> params(bytes);
  for (int i = 0; i < count; ++i) {
    uint32_t offset, size;
    gnaforge_emulator_param(module, kernel.name.c_str(), i, &offset, &size);
    std::memcpy(params.data() + offset, arguments[i], size);
  }
  GnaforgeEmulatorLaunch how = settings.launch;
  how.grid[0] = grid.x;
  how.grid[1] = grid.y;
  how.grid[2] = grid.z;
  how.block[0] = block.x;
  how.block[1] = block.y;
  how.block[2] = block.z;
  how.dynamic_shared = static_cast<uint32_t>(shared);
  how.early = early;
  for (const std::string& part : settings.unchecked) how.unchecked |= kernel.name.find(part) != std::string::npos;
  if (!settings.keep.empty()) keep(kernel, how, params);
  GnaforgeEmulatorCounters counted{};
  std::vector<uint64_t> executed(gnaforge_emulator_instructions(module));
  if (gnaforge_emulator_launch(module, kernel.name.c_str(), &how, params.data(), bytes, ranges, &counted,
                               executed.data(), nullptr)) {
    sticky_ = cudaErrorLaunchFailure;
    return fail(cudaErrorLaunchFailure, gnaforge_emulator_error());
  }
  record(module, kernel, how, counted, executed);
  if (settings.trace)
    std::fprintf(stderr, "gnaforge emulator: %s grid %u,%u,%u block %u,%u,%u: %llu warp instructions\n",
                 kernel.name.c_str(), grid.x, grid.y, grid.z, block.x, block.y, block.z,
                 static_cast<unsigned long long>(counted.instructions));
  return cudaSuccess;
}

void State::keep(const Kernel& kernel, const GnaforgeEmulatorLaunch& how, const std::vector<uint8_t>& params) {
  static int number = 0;
  std::string base = settings.keep + "/" + std::to_string(number++);
  std::ofstream launch(base + ".json");
  auto list = [](const uint32_t (&of)[3]) {
    return "[" + std::to_string(of[0]) + ", " + std::to_string(of[1]) + ", " + std::to_string(of[2]) + "]";
  };
  launch << "{\"kernel\": \"" << kernel.name << "\", \"grid\": " << list(how.grid) << ", \"block\": " << list(how.block)
         << ", \"shared_bytes\": " << how.dynamic_shared << ", \"early\": " << (how.early ? "true" : "false") << "}\n";
  std::ofstream(base + ".params", std::ios::binary)
      .write(reinterpret_cast<const char*>(params.data()), static_cast<std::streamsize>(params.size()));
  std::ofstream text(base + ".ptx");
  for (const std::string& each : kernel.binary->texts)
    if (each.find(kernel.name) != std::string::npos) text << each;
  if (!launch.flush() || !text.flush())
    std::fprintf(stderr, "gnaforge emulator: can't write to the folder %s\n", settings.keep.c_str());
}

cudaError_t State::fail(cudaError_t error, const std::string& message) {
  error_ = error;
  if (!message.empty()) messages_.push_back(message);
  if (!message.empty()) std::fprintf(stderr, "gnaforge emulator: %s\n", message.c_str());
  return error;
}

void State::record(void* module, const Kernel& kernel, const GnaforgeEmulatorLaunch& how,
                   const GnaforgeEmulatorCounters& counted, const std::vector<uint64_t>& executed) {
  auto triple = [](const uint32_t (&of)[3]) {
    return "[" + std::to_string(of[0]) + "," + std::to_string(of[1]) + "," + std::to_string(of[2]) + "]";
  };
  std::string line =
      "{\"kernel\":" + quoted(kernel.name) + ",\"grid\":" + triple(how.grid) + ",\"block\":" + triple(how.block);
  auto number = [&](const char* name, uint64_t value) {
    line += std::string(",\"") + name + "\":" + std::to_string(value);
  };
  number("shared_bytes", how.dynamic_shared);
  number("instructions", counted.instructions);
  number("async_load_bytes", counted.async_load_bytes);
  number("async_store_bytes", counted.async_store_bytes);
  number("load_bytes", counted.load_bytes);
  number("store_bytes", counted.store_bytes);
  number("interior_tiles", counted.interior_tiles);
  number("shell_tiles", counted.shell_tiles);
  number("interior_instructions", counted.interior_instructions);
  number("shell_instructions", counted.shell_instructions);
  number("mma_operations", counted.mma_operations);
  line += std::string(",\"opcodes\":") + gnaforge_emulator_opcode_counts(module, executed.data()) + "}";
  if (!settings.counters.empty()) {
    std::ofstream file(settings.counters, std::ios::app);
    file << line << "\n";
    if (!file.flush()) std::fprintf(stderr, "gnaforge emulator: can't write to %s\n", settings.counters.c_str());
  }
  launches_.push_back(std::move(line));
  if (launches_.size() > kMostLaunches) launches_.erase(launches_.begin());
}

void State::reset() {
  error_ = sticky_ = cudaSuccess;
  gnaforge_emulator_memory_settle(ranges);
  messages_.clear();
  launches_.clear();
}

std::string State::report() const {
  std::string out = "{\"messages\":[";
  for (size_t i = 0; i < messages_.size(); ++i) out += (i ? "," : "") + quoted(messages_[i]);
  out += "],\"launches\":[";
  for (size_t i = 0; i < launches_.size(); ++i) out += (i ? "," : "") + launches_[i];
  return out + "]}";
}

cudaError_t State::synchronize() {
  gnaforge_emulator_memory_settle(ranges);
  return peek_error();
}

cudaError_t State::take_error() {
  cudaError_t error = peek_error();
  error_ = cudaSuccess;
  return error;
}

}  // namespace gnaforge::standin
