// A small attention kernel for sm_90a with everything that the emulator is for: tensor copies into a ring of mbarrier
// stages, wgmma from shared memory and from registers, stmatrix, and a tensor store. One warp loads, four compute.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kRows = 64, kKeys = 64, kDim = 64, kStages = 2, kThreads = 160;
constexpr int kTileBytes = 64 * kDim * 2;

struct __align__(1024) Shared {
  uint8_t q[kTileBytes], k[kStages][kTileBytes], v[kStages][kTileBytes], o[kTileBytes];
  uint64_t q_full, full[kStages], empty[kStages];
};

__device__ uint32_t address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ void barrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(count) : "memory");
}
__device__ void barrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes) : "memory");
}
__device__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}
__device__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "AGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra AGAIN;\n"
      "DONE:\n"
      "}" ::"r"(address(barrier)),
      "r"(parity)
      : "memory");
}
__device__ void tensor_load(void* to, const CUtensorMap* map, uint64_t* barrier, int row, int head) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(address(to)),
      "l"(map), "r"(address(barrier)), "r"(0), "r"(row), "r"(head)
      : "memory");
}
// The swizzle repeats after 1024 bytes: 8 rows of 128.
__device__ uint64_t descriptor(uint32_t start) {
  return uint64_t{(start & 0x3ffff) >> 4} | uint64_t{1024 >> 4} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

#define ACCUMULATORS(c)                                                                                       \
  "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), \
      "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]),  \
      "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), \
      "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])
#define NAMES                                                                                                       \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, "                                                                                                      \
  "%26, %27, %28, %29, %30, %31}"

__device__ void multiply_shared(float (&c)[32], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " NAMES ", %32, %33, p, 1, 1, 0, 0;\n}"
      : ACCUMULATORS(c)
      : "l"(a), "l"(b), "r"(accumulate));
}
__device__ void multiply_registers(float (&c)[32], const uint32_t* a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " NAMES
               ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
               : ACCUMULATORS(c)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void wgmma_commit_and_wait() {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}
__device__ void hold(float (&c)[32]) {  // keeps the compiler from moving accesses across the wait
#pragma unroll
  for (float& x : c) asm volatile("" : "+f"(x)::"memory");
}
__device__ uint32_t pack(float low, float high) {
  __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&two);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
    attention(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
              const __grid_constant__ CUtensorMap v, const __grid_constant__ CUtensorMap o, float* lse, int rows,
              int keys, float scale) {
  extern __shared__ uint8_t raw[];
  Shared& shared = *reinterpret_cast<Shared*>(raw);
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, head = blockIdx.y, first = blockIdx.x * kRows;
  int tiles = (keys + kKeys - 1) / kKeys;
  if (threadIdx.x == 0) {
    barrier_init(&shared.q_full, 1);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&shared.full[i], 1);
      barrier_init(&shared.empty[i], 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  if (warp == 4) {
    if (lane != 0) return;
    barrier_expect(&shared.q_full, kTileBytes);
    tensor_load(shared.q, &q, &shared.q_full, first, head);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
      int stage = tile % kStages, round = tile / kStages;
      barrier_wait(&shared.empty[stage], (round & 1) ^ 1);
      barrier_expect(&shared.full[stage], 2 * kTileBytes);
      tensor_load(shared.k[stage], &k, &shared.full[stage], tile * kKeys, head);
      tensor_load(shared.v[stage], &v, &shared.full[stage], tile * kKeys, head);
    }
    return;
  }

  float acc[32] = {}, peak[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
  barrier_wait(&shared.q_full, 0);
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    int stage = tile % kStages, round = tile / kStages;
    barrier_wait(&shared.full[stage], round & 1);
    float s[32];
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step)
      multiply_shared(s, descriptor(address(shared.q) + 32 * step), descriptor(address(shared.k[stage]) + 32 * step),
                      step);
    wgmma_commit_and_wait();
    hold(s);
    uint32_t p[16];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float high = peak[r];
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        int at = 4 * (i / 2) + 2 * r + i % 2, key = tile * kKeys + 8 * (i / 2) + 2 * (lane % 4) + i % 2;
        s[at] = key < keys ? s[at] * scale : -INFINITY;
        high = fmaxf(high, s[at]);
      }
      high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
      high = fmaxf(high, __shfl_xor_sync(~0u, high, 2));
      float shrink = __expf(peak[r] - high);
      peak[r] = high;
      sum[r] *= shrink;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float* two = &s[4 * i + 2 * r];
        two[0] = __expf(two[0] - high);
        two[1] = __expf(two[1] - high);
        sum[r] += two[0] + two[1];
        acc[4 * i + 2 * r] *= shrink;
        acc[4 * i + 2 * r + 1] *= shrink;
      }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) p[i] = pack(s[2 * i], s[2 * i + 1]);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step)
      multiply_registers(acc, p + 4 * step, descriptor(address(shared.v[stage]) + 2048 * step));
    wgmma_commit_and_wait();
    hold(acc);
    if (lane == 0) barrier_arrive(&shared.empty[stage]);
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
    sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    int row = first + 16 * warp + lane / 4 + 8 * r;
    if (lane % 4 == 0 && row < rows) lse[head * rows + row] = peak[r] + __logf(sum[r]);
  }
  int row = 16 * warp + lane % 16;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = pack(acc[8 * c + 2 * i] / sum[i % 2], acc[8 * c + 2 * i + 1] / sum[i % 2]);
    uint32_t to = address(shared.o) + 128 * row + (((2 * c + lane / 16) ^ (row % 8)) << 4);
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;\nbar.sync 1, 128;" ::: "memory");
  if (threadIdx.x == 0) {
    asm volatile(
        "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], "
        "[%1];\ncp.async.bulk.commit_group;" ::"l"(&o),
        "r"(address(shared.o)), "r"(0), "r"(first), "r"(head)
        : "memory");
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}

namespace {

/// Encodes [heads][rows][64] of bf16 as boxes of 64 rows; false if the driver refuses.
bool encode(CUtensorMap* map, const void* data, int heads, int rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result) !=
      cudaSuccess)
    return false;
  if (result != cudaDriverEntryPointSuccess) return false;
  cuuint64_t dims[3] = {kDim, static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(heads)};
  cuuint64_t strides[2] = {kDim * 2, static_cast<cuuint64_t>(rows) * kDim * 2};
  cuuint32_t box[3] = {kDim, 64, 1}, steps[3] = {1, 1, 1};
  return reinterpret_cast<Encode>(found)(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(data), dims,
                                         strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                         CU_TENSOR_MAP_L2_PROMOTION_NONE,
                                         CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace

/// Runs the kernel on device memory. Returns a cudaError_t.
extern "C" __attribute__((visibility("default"))) int attention_run(const void* q, const void* k, const void* v,
                                                                    void* o, float* lse, int heads, int rows, int keys,
                                                                    float scale, cudaStream_t stream) {
  CUtensorMap maps[4];
  if (!encode(&maps[0], q, heads, rows) || !encode(&maps[1], k, heads, keys) || !encode(&maps[2], v, heads, keys) ||
      !encode(&maps[3], o, heads, rows))
    return cudaErrorInvalidValue;
  cudaError_t error = cudaFuncSetAttribute(attention, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (error != cudaSuccess) return error;
  dim3 grid((rows + kRows - 1) / kRows, heads);
  attention<<<grid, kThreads, sizeof(Shared), stream>>>(maps[0], maps[1], maps[2], maps[3], lse, rows, keys, scale);
  return cudaGetLastError();
}
