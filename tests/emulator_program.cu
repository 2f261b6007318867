// A program that uses the CUDA runtime as launchers do; the stand-in's tests run it with a case's name.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

__device__ int bias[2];

__global__ void scale_and_add(int* out, const int* in, int factor, int count) {
  int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) out[i] = in[i] * factor + bias[i % 2];
}

__global__ void reverse(int* data) {
  extern __shared__ int room[];
  cudaGridDependencySynchronize();
  room[threadIdx.x] = data[threadIdx.x];
  __syncthreads();
  data[threadIdx.x] = room[blockDim.x - 1 - threadIdx.x];
}

__global__ void unordered(int* data) { *data = 1; }

static int failed(cudaError_t error) {
  std::printf("error %d %s\n", static_cast<int>(error), cudaGetErrorString(error));
  return 1;
}
#define CHECK(call) \
  if (cudaError_t error = (call); error != cudaSuccess) return failed(error)

static int everything() {
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  std::printf("%s %d.%d %d\n", properties.name, properties.major, properties.minor, properties.multiProcessorCount);
  constexpr int kCount = 1000;
  std::vector<int> host(kCount), back(kCount);
  for (int i = 0; i < kCount; ++i) host[i] = i;
  int *in, *out, offsets[2] = {5, 7};
  cudaStream_t stream;
  cudaEvent_t begin, end;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  CHECK(cudaMalloc(&in, kCount * sizeof(int)));
  CHECK(cudaMalloc(&out, kCount * sizeof(int)));
  CHECK(cudaMemcpyToSymbol(bias, offsets, sizeof offsets));
  CHECK(cudaMemcpyAsync(in, host.data(), kCount * sizeof(int), cudaMemcpyHostToDevice, stream));
  CHECK(cudaMemsetAsync(out, 0, kCount * sizeof(int), stream));
  CHECK(cudaEventRecord(begin, stream));
  scale_and_add<<<(kCount + 127) / 128, 128, 0, stream>>>(out, in, 3, kCount);
  CHECK(cudaGetLastError());
  CHECK(cudaFuncSetAttribute(reverse, cudaFuncAttributeMaxDynamicSharedMemorySize, 100000));
  cudaLaunchConfig_t config = {};
  config.gridDim = 1;
  config.blockDim = 256;
  config.dynamicSmemBytes = 100000;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  CHECK(cudaLaunchKernelEx(&config, reverse, out));
  CHECK(cudaEventRecord(end, stream));
  CHECK(cudaStreamSynchronize(stream));
  float milliseconds = -1;
  CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
  CHECK(cudaMemcpy(back.data(), out, kCount * sizeof(int), cudaMemcpyDeviceToHost));
  for (int i = 0; i < kCount; ++i) {
    int from = i < 256 ? 255 - i : i;
    if (back[i] != 3 * from + offsets[from % 2] || milliseconds < 0) return 2;
  }
  CHECK(cudaFree(in));
  CHECK(cudaFree(out));
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaStreamDestroy(stream));
  std::puts("ok");
  return 0;
}

static int past_the_end(bool after_free) {
  int *in, *out;
  CHECK(cudaMalloc(&in, 100 * sizeof(int)));
  CHECK(cudaMalloc(&out, 200 * sizeof(int)));
  CHECK(cudaMemset(in, 0, 100 * sizeof(int)));
  if (after_free) CHECK(cudaFree(in));
  scale_and_add<<<1, 128>>>(out, in, 1, after_free ? 1 : 101);
  cudaError_t error = cudaGetLastError();
  // The device stays unusable.
  if (error != cudaErrorLaunchFailure || cudaDeviceSynchronize() != cudaErrorLaunchFailure) return 2;
  return failed(error);
}

static int too_much_shared() {
  int* data;
  CHECK(cudaMalloc(&data, 4096));
  reverse<<<1, 32, 65536>>>(data);
  CHECK(cudaGetLastError());
  return 2;
}

static int bad_tensor_map() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
  CUtensorMap map;
  alignas(16) static char data[4096];
  cuuint64_t dims[2] = {10, 10}, strides[1] = {40};
  cuuint32_t box[2] = {8, 8}, steps[2] = {1, 1};
  CUresult error = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found)(
      &map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2, data, dims, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return error == CUDA_ERROR_INVALID_VALUE ? failed(cudaErrorInvalidValue) : 2;
}

static int cluster() {
  int* data;
  CHECK(cudaMalloc(&data, 4096));
  cudaLaunchConfig_t config = {};
  config.gridDim = 2;
  config.blockDim = 32;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = 2;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  CHECK(cudaLaunchKernelEx(&config, reverse, data));
  return 2;
}

static int early() {
  int* data;
  CHECK(cudaMalloc(&data, sizeof(int)));
  cudaLaunchConfig_t config = {};
  config.gridDim = config.blockDim = 1;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 0;
  config.attrs = &attribute;
  config.numAttrs = 1;
  CHECK(cudaLaunchKernelEx(&config, unordered, data));
  attribute.val.programmaticStreamSerializationAllowed = 1;
  CHECK(cudaLaunchKernelEx(&config, unordered, data));
  return 2;
}

/// Writes a slot with what it reads in another. Waits for the launches before it at first, or at its end, or never:
/// then it runs beside the one before. Lets the next one begin at first, after that wait, or never.
__global__ void beside(const int* from, int* to, char waits, char begins_others) {
  if (begins_others == 'f') asm volatile("griddepcontrol.launch_dependents;");
  if (waits == 'f')
    asm volatile("griddepcontrol.wait;" ::: "memory");
  else
    asm volatile("pmevent 4;");
  if (begins_others == 'w') asm volatile("griddepcontrol.launch_dependents;");
  *to = *from + 1;
  if (waits == 'e') asm volatile("griddepcontrol.wait;" ::: "memory");
}

/// `launches`: of each the slots that it reads and writes, its `waits` and its `begins_others`, and a separator, which
/// waits for all of them if it is a semicolon.
static int run_beside(const char* launches) {
  int* slots;
  CHECK(cudaMalloc(&slots, 10 * sizeof(int)));
  CHECK(cudaMemset(slots, 0, 10 * sizeof(int)));
  for (const char* one = launches; *one; one += one[4] ? 5 : 4) {
    cudaLaunchConfig_t config = {};
    config.gridDim = config.blockDim = 1;
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
    CHECK(cudaLaunchKernelEx(&config, beside, static_cast<const int*>(slots + one[0] - '0'), slots + one[1] - '0',
                             one[2], one[3]));
    if (one[4] == ';') CHECK(cudaDeviceSynchronize());
  }
  std::puts("ok");
  return 0;
}

static int race() {
  int* data;
  CHECK(cudaMalloc(&data, sizeof(int)));
  unordered<<<2, 1>>>(data);
  CHECK(cudaGetLastError());
  std::puts("ok");
  return 0;
}

int main(int, char** arguments) {
  std::string name = arguments[1];
  if (name == "everything") return everything();
  if (name == "past-the-end") return past_the_end(false);
  if (name == "after-free") return past_the_end(true);
  if (name == "too-much-shared") return too_much_shared();
  if (name == "bad-tensor-map") return bad_tensor_map();
  if (name == "cluster") return cluster();
  if (name == "early") return early();
  if (name == "race") return race();
  if (name.rfind("beside:", 0) == 0) return run_beside(arguments[1] + 7);
  return 3;
}
