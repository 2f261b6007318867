// Stands in for libcudart: what nvcc's host code calls, and the part of the API that launchers use. All work is done
// before a call returns, so streams and events have nothing to do.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "state.h"

using gnaforge::standin::FatBinary;
using gnaforge::standin::Kernel;
using gnaforge::standin::State;
using Lock = std::lock_guard<std::recursive_mutex>;

namespace {

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> pushed;

/// The kernel behind a host function, or behind the handle that __cudaGetKernel gave, which is the same.
Kernel* kernel_of(const void* function) { return State::get().find(function); }

using Clock = std::chrono::steady_clock;
struct Event {
  Clock::time_point when;
};

}  // namespace

extern "C" {

// --- what nvcc's host code calls

void** __cudaRegisterFatBinary(void* wrapper) {
  Lock lock(State::get().mutex);
  return reinterpret_cast<void**>(State::get().add_binary(wrapper));
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }

void __cudaRegisterFunction(void** binary, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  Lock lock(State::get().mutex);
  Kernel kernel;
  kernel.binary = reinterpret_cast<FatBinary*>(binary);
  kernel.name = name;
  State::get().kernels[host] = kernel;
}
void __cudaRegisterVar(void** binary, char* host, char*, const char* name, int, size_t, int, int) {
  Lock lock(State::get().mutex);
  State::get().variables[host] = {reinterpret_cast<FatBinary*>(binary), name};
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  pushed.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (pushed.empty()) return cudaErrorMissingConfiguration;
  *grid = pushed.back().grid;
  *block = pushed.back().block;
  *shared = pushed.back().shared;
  *static_cast<cudaStream_t*>(stream) = pushed.back().stream;
  pushed.pop_back();
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* out, const void* function) {
  *out = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return kernel_of(function) ? cudaSuccess : cudaErrorInvalidDeviceFunction;
}

static cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared, bool early) {
  State& state = State::get();
  Lock lock(state.mutex);
  Kernel* kernel = kernel_of(function);
  if (!kernel) return state.fail(cudaErrorInvalidDeviceFunction, "launch of a function that is no kernel");
  return state.launch(*kernel, grid, block, arguments, shared, early);
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t) {
  return launch(function, grid, block, arguments, shared, false);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  State& state = State::get();
  Lock lock(state.mutex);
  bool early = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization)
      early = attribute.val.programmaticStreamSerializationAllowed != 0;
    if (attribute.id != cudaLaunchAttributeClusterDimension) continue;
    const auto& cluster = attribute.val.clusterDim;
    if (cluster.x * cluster.y * cluster.z != 1)
      return state.fail(cudaErrorNotSupported, "clusters of more than one CTA are not emulated");
  }
  return launch(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, early);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  State& state = State::get();
  Lock lock(state.mutex);
  Kernel* kernel = kernel_of(function);
  if (!kernel) return state.fail(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || value > 227 * 1024) return state.fail(cudaErrorInvalidValue);
    kernel->dynamic_shared_limit = value;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, const void* function) {
  State& state = State::get();
  Lock lock(state.mutex);
  Kernel* kernel = kernel_of(function);
  if (!kernel) return state.fail(cudaErrorInvalidDeviceFunction);
  std::memset(out, 0, sizeof *out);
  out->maxThreadsPerBlock = 1024;
  out->maxDynamicSharedSizeBytes = kernel->dynamic_shared_limit;
  out->ptxVersion = out->binaryVersion = 10 * state.settings.device.major + state.settings.device.minor;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int threads, size_t shared,
                                                                   unsigned) {
  int by_shared = shared ? static_cast<int>(228 * 1024 / (shared + 1024)) : 32;
  *blocks = std::max(0, std::min(std::min(32, 2048 / std::max(threads, 1)), by_shared));
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function, int threads,
                                                          size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}

// --- errors

cudaError_t cudaGetLastError() { return State::get().take_error(); }
cudaError_t cudaPeekAtLastError() { return State::get().peek_error(); }
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    case cudaErrorInvalidPtx: return "cudaErrorInvalidPtx";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    default: return "cudaErrorUnknown";
  }
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

// --- memory

cudaError_t cudaMalloc(void** out, size_t size) {
  Lock lock(State::get().mutex);
  return State::get().allocate(out, size);
}
cudaError_t cudaMallocAsync(void** out, size_t size, cudaStream_t) { return cudaMalloc(out, size); }
cudaError_t cudaMallocManaged(void** out, size_t size, unsigned) { return cudaMalloc(out, size); }
cudaError_t cudaMallocHost(void** out, size_t size) { return cudaMalloc(out, size); }
cudaError_t cudaHostAlloc(void** out, size_t size, unsigned) { return cudaMalloc(out, size); }
cudaError_t cudaFree(void* pointer) {
  Lock lock(State::get().mutex);
  return State::get().release(pointer);
}
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) { return cudaFree(pointer); }
cudaError_t cudaFreeHost(void* pointer) { return cudaFree(pointer); }
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  if (size) std::memmove(to, from, size);
  return State::get().synchronize();
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, size, kind);
}
cudaError_t cudaMemset(void* to, int value, size_t size) {
  if (size) std::memset(to, value, size);
  return State::get().synchronize();
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t) { return cudaMemset(to, value, size); }
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  *available = *total = State::get().settings.device.memory;
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void** out, const void* symbol) {
  State& state = State::get();
  Lock lock(state.mutex);
  auto found = state.variables.find(symbol);
  if (found == state.variables.end()) return state.fail(cudaErrorInvalidSymbol);
  void* module = state.module_of(*found->second.first);
  uint64_t size = 0, address = module ? gnaforge_emulator_variable(module, found->second.second.c_str(), &size) : 0;
  *out = reinterpret_cast<void*>(address);
  return address ? cudaSuccess : state.fail(cudaErrorInvalidSymbol);
}
cudaError_t cudaMemcpyToSymbol(const void* symbol, const void* from, size_t size, size_t offset, cudaMemcpyKind) {
  void* address = nullptr;
  cudaError_t error = cudaGetSymbolAddress(&address, symbol);
  if (error == cudaSuccess) std::memcpy(static_cast<char*>(address) + offset, from, size);
  return error;
}

// --- devices

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : State::get().fail(cudaErrorInvalidDevice); }
cudaError_t cudaDeviceSynchronize() { return State::get().synchronize(); }
cudaError_t cudaDeviceReset() { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* out, int device) {
  const auto& emulated = State::get().settings.device;
  if (device != 0) return State::get().fail(cudaErrorInvalidDevice);
  std::memset(out, 0, sizeof *out);
  std::strncpy(out->name, emulated.name, sizeof out->name - 1);
  out->major = emulated.major;
  out->minor = emulated.minor;
  out->multiProcessorCount = emulated.processors;
  out->totalGlobalMem = emulated.memory;
  out->sharedMemPerBlock = 48 * 1024;
  out->sharedMemPerBlockOptin = 227 * 1024;
  out->sharedMemPerMultiprocessor = 228 * 1024;
  out->reservedSharedMemPerBlock = 1024;
  out->regsPerBlock = out->regsPerMultiprocessor = 65536;
  out->warpSize = 32;
  out->maxThreadsPerBlock = 1024;
  out->maxThreadsPerMultiProcessor = 2048;
  out->maxBlocksPerMultiProcessor = 32;
  out->maxThreadsDim[0] = out->maxThreadsDim[1] = 1024;
  out->maxThreadsDim[2] = 64;
  out->maxGridSize[0] = 2147483647;
  out->maxGridSize[1] = out->maxGridSize[2] = 65535;
  out->l2CacheSize = 50 << 20;
  out->unifiedAddressing = out->concurrentKernels = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  cudaDeviceProp properties;
  cudaError_t error = cudaGetDeviceProperties(&properties, device);
  if (error != cudaSuccess) return error;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = properties.maxThreadsPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = static_cast<int>(properties.sharedMemPerBlock); break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = static_cast<int>(properties.sharedMemPerBlockOptin); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = static_cast<int>(properties.sharedMemPerMultiprocessor);
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = 1024; break;
    case cudaDevAttrMultiProcessorCount: *value = properties.multiProcessorCount; break;
    case cudaDevAttrComputeCapabilityMajor: *value = properties.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = properties.minor; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = 65536; break;
    case cudaDevAttrL2CacheSize: *value = properties.l2CacheSize; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = properties.maxThreadsPerMultiProcessor; break;
    default:
      return State::get().fail(cudaErrorNotSupported,
                               "cudaDeviceGetAttribute of attribute " + std::to_string(attribute));
  }
  return cudaSuccess;
}

// --- the driver's functions

static cudaError_t driver_function(const char* name, void** out, cudaDriverEntryPointQueryResult* result) {
  struct Named {
    const char* name;
    void* function;
  };
  static const Named kFunctions[] = {
      {"cuTensorMapEncodeTiled", reinterpret_cast<void*>(&cuTensorMapEncodeTiled)},
      {"cuGetErrorString", reinterpret_cast<void*>(&cuGetErrorString)},
      {"cuGetErrorName", reinterpret_cast<void*>(&cuGetErrorName)},
      {"cuDriverGetVersion", reinterpret_cast<void*>(&cuDriverGetVersion)},
      {"cuInit", reinterpret_cast<void*>(&cuInit)},
  };
  *out = nullptr;
  for (const Named& entry : kFunctions)
    if (std::strcmp(name, entry.name) == 0) *out = entry.function;
  if (result) *result = *out ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *out ? cudaSuccess
              : State::get().fail(cudaErrorSymbolNotFound, std::string("the driver's ") + name + " is not emulated");
}
// Deprecated, but programs still call it.
cudaError_t cudaGetDriverEntryPoint(const char* name, void** out, unsigned long long,
                                    cudaDriverEntryPointQueryResult* result) {
  return driver_function(name, out, result);
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** out, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  return driver_function(name, out, result);
}

// --- streams and events

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = reinterpret_cast<cudaStream_t>(new char);
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return cudaStreamCreate(stream); }
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete reinterpret_cast<char*>(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t) { return State::get().synchronize(); }
cudaError_t cudaStreamQuery(cudaStream_t) { return State::get().peek_error(); }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  *event = reinterpret_cast<cudaEvent_t>(new Event{Clock::now()});
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  reinterpret_cast<Event*>(event)->when = Clock::now();
  return State::get().peek_error();
}
cudaError_t cudaEventSynchronize(cudaEvent_t) { return State::get().synchronize(); }
cudaError_t cudaEventQuery(cudaEvent_t) { return State::get().peek_error(); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  // The emulator's own time: says nothing about a GPU.
  std::chrono::duration<float, std::milli> between =
      reinterpret_cast<Event*>(end)->when - reinterpret_cast<Event*>(start)->when;
  *milliseconds = between.count();
  return cudaSuccess;
}

}  // extern "C"
