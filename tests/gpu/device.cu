// What measuring takes of the CUDA runtime, as C functions for ctypes: memory with values that the host can make again,
// times and clocks around launches, exact attention of single queries. Each function returns null, or what went wrong.
// All work goes to the default stream, which is also torch's.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <map>
#include <vector>

#include "gnaforge/abi.h"

namespace gnaforge::measuring {

/// A processor, its clock, and the time that all processors share (PTX: %smid, %clock64, %globaltimer).
struct Stamp {
  unsigned long long processor, cycles, nanoseconds;
};

/// A stamp by each block. There are more blocks than processors, so that one comes to nearly every processor.
__global__ void take_stamps(Stamp* stamps) {
  unsigned processor;
  unsigned long long cycles, nanoseconds;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(processor));
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(cycles));
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(nanoseconds));
  if (threadIdx.x == 0) stamps[blockIdx.x] = {processor, cycles, nanoseconds};
}

/// Nearly normal: the sum of four uniform numbers, of a hash (splitmix64, Steele, Lea and Flood 2014). The same on GPU
/// and host: integers, and one rounded product.
__host__ __device__ inline float value_at(uint64_t seed, uint64_t index) {
  uint64_t x = (seed << 40) + index + 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  x ^= x >> 31;
  int sum = static_cast<int>((x & 0xffff) + (x >> 16 & 0xffff) + (x >> 32 & 0xffff) + (x >> 48));
  return static_cast<float>(sum - 131070) * 2.6429e-5f;
}

template <class T>
__host__ __device__ T rounded(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    return T(x);
  }
}

template <class T>
__global__ void fill(T* data, uint64_t count, uint64_t seed) {
  uint64_t step = uint64_t{gridDim.x} * blockDim.x;
  for (uint64_t i = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step)
    data[i] = rounded<T>(value_at(seed, i));
}

double rounded_value(int dtype, uint64_t seed, uint64_t index) {
  float x = value_at(seed, index);
  if (dtype == GNAFORGE_BF16) return static_cast<float>(rounded<__nv_bfloat16>(x));
  if (dtype == GNAFORGE_FP16) return static_cast<float>(rounded<__half>(x));
  return x;
}

struct State {
  int processors = 0;
  unsigned blocks = 0;  // that take stamps
  Stamp* stamps[2] = {};
  cudaEvent_t events[2] = {};
};
State state;

const char* said(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace gnaforge::measuring

using namespace gnaforge::measuring;

#define EXPORT extern "C" __attribute__((visibility("default")))
#define TRY(call) \
  if (cudaError_t error = call; error != cudaSuccess) return said(error)

struct DeviceFacts {
  char name[256];
  int major, minor, processors, driver, runtime;
  uint64_t memory, l2_bytes;
};

/// The first device, and what takes stamps on it.
EXPORT const char* device_open(DeviceFacts* facts) {
  cudaDeviceProp found;
  TRY(cudaDriverGetVersion(&facts->driver));
  TRY(cudaRuntimeGetVersion(&facts->runtime));
  TRY(cudaSetDevice(0));
  TRY(cudaGetDeviceProperties(&found, 0));
  std::snprintf(facts->name, sizeof facts->name, "%s", found.name);
  facts->major = found.major;
  facts->minor = found.minor;
  facts->processors = state.processors = found.multiProcessorCount;
  facts->memory = found.totalGlobalMem;
  facts->l2_bytes = static_cast<uint64_t>(found.l2CacheSize);
  state.blocks = 8u * static_cast<unsigned>(state.processors);
  for (int i = 0; i < 2; ++i) {
    TRY(cudaMalloc(reinterpret_cast<void**>(&state.stamps[i]), sizeof(Stamp) * state.blocks));
    TRY(cudaEventCreate(&state.events[i]));
  }
  return nullptr;
}

/// Null where there is not as much memory, which does no harm.
EXPORT const char* device_allocate(void** out, uint64_t bytes) {
  cudaError_t error = cudaMalloc(out, bytes);
  if (error != cudaErrorMemoryAllocation) return said(error);
  cudaGetLastError();
  *out = nullptr;
  return nullptr;
}
EXPORT const char* device_release(void* memory) { return said(cudaFree(memory)); }
EXPORT const char* device_set(void* memory, int byte, uint64_t bytes) { return said(cudaMemset(memory, byte, bytes)); }
EXPORT const char* device_read(void* to, const void* from, uint64_t bytes) {
  return said(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost));
}
/// Waits for all work, whose errors this returns.
EXPORT const char* device_wait() { return said(cudaDeviceSynchronize()); }

/// `count` elements whose values `seed` decides.
EXPORT const char* device_fill(void* data, uint64_t count, int dtype, uint64_t seed) {
  unsigned blocks = static_cast<unsigned>(std::min<uint64_t>((count + 255) / 256, state.blocks));
  if (dtype == GNAFORGE_BF16)
    fill<<<blocks, 256>>>(static_cast<__nv_bfloat16*>(data), count, seed);
  else if (dtype == GNAFORGE_FP16)
    fill<<<blocks, 256>>>(static_cast<__half*>(data), count, seed);
  else
    fill<<<blocks, 256>>>(static_cast<float*>(data), count, seed);
  return said(cudaGetLastError());
}

/// Begins what is measured (0), or ends it (1).
EXPORT const char* device_mark(int which) {
  if (which == 1) TRY(cudaEventRecord(state.events[1], nullptr));
  take_stamps<<<state.blocks, 32>>>(state.stamps[which]);
  TRY(cudaGetLastError());
  if (which == 0) TRY(cudaEventRecord(state.events[0], nullptr));
  return nullptr;
}

struct Elapsed {
  double seconds;              // between the marks, by events
  double cycles, nanoseconds;  // between the stamps of a processor, medians; 0 where nothing counts them
  int processors;              // that were stamped twice
};

/// Waits for the second mark.
EXPORT const char* device_elapsed(Elapsed* out) {
  float milliseconds = 0;
  TRY(cudaEventSynchronize(state.events[1]));
  TRY(cudaDeviceSynchronize());
  TRY(cudaEventElapsedTime(&milliseconds, state.events[0], state.events[1]));
  std::map<uint64_t, Stamp> found[2];  // by processor; of several stamps any will do
  for (int i = 0; i < 2; ++i) {
    std::vector<Stamp> stamps(state.blocks);
    TRY(cudaMemcpy(stamps.data(), state.stamps[i], sizeof(Stamp) * state.blocks, cudaMemcpyDeviceToHost));
    for (const Stamp& stamp : stamps) found[i].emplace(stamp.processor, stamp);
  }
  std::vector<double> cycles, nanoseconds;
  for (const auto& [processor, begin] : found[0]) {
    auto end = found[1].find(processor);
    if (end == found[1].end()) continue;
    cycles.push_back(static_cast<double>(static_cast<int64_t>(end->second.cycles - begin.cycles)));
    nanoseconds.push_back(static_cast<double>(static_cast<int64_t>(end->second.nanoseconds - begin.nanoseconds)));
  }
  auto median = [](std::vector<double> of) {
    if (of.empty()) return 0.0;
    std::sort(of.begin(), of.end());
    return of[of.size() / 2];
  };
  *out = {milliseconds * 1e-3, median(cycles), median(nanoseconds), static_cast<int>(cycles.size())};
  return nullptr;
}

/// One query of a call whose tensors `device_fill` filled, heads-last without gaps. It sees `begin`, `begin` + `step`,
/// ... below `end` along each dimension.
struct Query {
  int rank, dtype;
  int64_t tokens[3], begin[3], end[3], step[3];
  int64_t batch, token, head, heads, kv_heads, head_dim, value_head_dim;
  double scale;
  uint64_t seeds[3];  // of Q, K and V
};

/// Attention in float64: `out` and `magnitude`, the same with |V|, [value_head_dim]; `lse`.
EXPORT const char* device_exact(const Query* query, double* out, double* magnitude, double* lse) {
  const Query& q = *query;
  int64_t extent[3] = {1, 1, 1}, begin[3] = {}, end[3] = {1, 1, 1}, step[3] = {1, 1, 1};
  for (int d = 0; d < q.rank; ++d) {
    int at = 3 - q.rank + d;
    extent[at] = q.tokens[d], begin[at] = q.begin[d], end[at] = q.end[d], step[at] = q.step[d];
  }
  int64_t tokens = extent[0] * extent[1] * extent[2], kv_head = q.head / (q.heads / q.kv_heads);
  std::vector<double> row(q.head_dim), scores;
  std::vector<int64_t> keys;
  for (int64_t c = 0; c < q.head_dim; ++c)
    row[c] = rounded_value(q.dtype, q.seeds[0], ((q.batch * tokens + q.token) * q.heads + q.head) * q.head_dim + c) *
             q.scale;
  for (int64_t z = begin[0]; z < end[0]; z += step[0])
    for (int64_t y = begin[1]; y < end[1]; y += step[1])
      for (int64_t x = begin[2]; x < end[2]; x += step[2]) {
        int64_t key = (q.batch * tokens + (z * extent[1] + y) * extent[2] + x) * q.kv_heads + kv_head;
        double score = 0;
        for (int64_t c = 0; c < q.head_dim; ++c)
          score += row[c] * rounded_value(q.dtype, q.seeds[1], key * q.head_dim + c);
        keys.push_back(key);
        scores.push_back(score);
      }
  if (keys.empty()) return "the query sees no key";
  double most = *std::max_element(scores.begin(), scores.end()), sum = 0;
  std::fill(out, out + q.value_head_dim, 0.0);
  std::fill(magnitude, magnitude + q.value_head_dim, 0.0);
  for (size_t i = 0; i < keys.size(); ++i) {
    double weight = std::exp(scores[i] - most);
    sum += weight;
    for (int64_t c = 0; c < q.value_head_dim; ++c) {
      double value = rounded_value(q.dtype, q.seeds[2], keys[i] * q.value_head_dim + c);
      out[c] += weight * value;
      magnitude[c] += weight * std::abs(value);
    }
  }
  for (int64_t c = 0; c < q.value_head_dim; ++c) out[c] /= sum, magnitude[c] /= sum;
  *lse = most + std::log(sum);
  return nullptr;
}
