// What the stand-in for the CUDA libraries keeps: modules, kernels, memory, settings.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "api.h"

namespace gnaforge::standin {

/// A device that programs believe to run on.
struct Device {
  const char* name;
  int major, minor, processors;
  uint64_t memory;
};

struct Settings {
  Device device;
  GnaforgeEmulatorLaunch launch;       // the schedule's fields
  std::vector<std::string> unchecked;  // parts of names: kernels that run without checks
  std::string keep;                    // folder that gets every launch, to be repeated from there; empty: none
  bool trace;                          // one line on stderr per launch
  std::string counters;                // file that gets a line of JSON per launch; empty: none
};

/// One fat binary: its PTX texts, parsed when a kernel of it is first used.
struct FatBinary {
  std::vector<std::string> texts;
  void* module = nullptr;
};

struct Kernel {
  FatBinary* binary;
  std::string name;
  int dynamic_shared_limit = 48 * 1024;  // until cudaFuncSetAttribute raises it
};

class State {
 public:
  static State& get();

  Settings settings;
  std::recursive_mutex mutex;
  std::map<const void*, Kernel> kernels;  // by the host function that stands for them
  std::map<const void*, std::pair<FatBinary*, std::string>> variables;
  std::map<uint64_t, std::vector<uint8_t>> memory;  // by the address handed out
  void* ranges;                                     // the engine's view of it

  FatBinary* add_binary(const void* wrapper);
  /// The parsed module. Null, with a message, if there is no PTX for the device or it can't be parsed.
  void* module_of(FatBinary& binary);
  Kernel* find(const void* host_function);

  cudaError_t allocate(void** out, size_t size);
  cudaError_t release(void* pointer);
  /// `early`: it may begin before the launch before it has ended.
  cudaError_t launch(Kernel& kernel, dim3 grid, dim3 block, void** arguments, size_t shared, bool early);
  /// Writes a launch to the folder `settings.keep`.
  void keep(const Kernel& kernel, const GnaforgeEmulatorLaunch& how, const std::vector<uint8_t>& params);

  /// Notes an error for cudaGetLastError, with a message on stderr if there is one.
  cudaError_t fail(cudaError_t error, const std::string& message = "");
  cudaError_t take_error();
  /// Whatever comes next comes after all launches so far. Returns what peek_error does.
  cudaError_t synchronize();
  /// Forgets errors, launches and messages.
  void reset();
  /// What happened since the last reset, as JSON: {"messages": [...], "launches": [...]}.
  std::string report() const;
  cudaError_t peek_error() const { return sticky_ != cudaSuccess ? sticky_ : error_; }

 private:
  State();
  void record(void* module, const Kernel& kernel, const GnaforgeEmulatorLaunch& how,
              const GnaforgeEmulatorCounters& counted, const std::vector<uint64_t>& executed);
  std::vector<std::string> messages_, launches_;
  cudaError_t error_ = cudaSuccess;
  cudaError_t sticky_ = cudaSuccess;  // a failed kernel leaves the device unusable, as on hardware
};

}  // namespace gnaforge::standin
