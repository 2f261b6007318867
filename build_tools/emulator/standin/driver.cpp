// Stands in for libcuda: what host code reaches through cudaGetDriverEntryPoint or links directly.
#include <cuda.h>

#include <cstdio>

#include "state.h"

using gnaforge::standin::State;

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }

CUresult cuDriverGetVersion(int* version) {
  *version = CUDA_VERSION;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char** text) {
  *text = error == CUDA_SUCCESS               ? "CUDA_SUCCESS"
          : error == CUDA_ERROR_INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE"
                                              : "CUDA_ERROR_UNKNOWN";
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) { return cuGetErrorName(error, text); }

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  if (!map || !dims || !box || !element_strides || (rank > 1 && !strides)) return CUDA_ERROR_INVALID_VALUE;
  static_assert(sizeof(cuuint64_t) == sizeof(uint64_t), "");
  uint64_t extents[5] = {}, steps[4] = {};
  for (cuuint32_t i = 0; i < rank && i < 5; ++i) extents[i] = dims[i];
  for (cuuint32_t i = 0; i + 1 < rank && i < 4; ++i) steps[i] = strides[i];
  if (gnaforge_emulator_tensor_map(map, type, rank, reinterpret_cast<uint64_t>(address), extents, steps, box,
                                   element_strides, interleave, swizzle, promotion, fill)) {
    std::fprintf(stderr, "gnaforge emulator: cuTensorMapEncodeTiled: %s\n", gnaforge_emulator_error());
    return CUDA_ERROR_INVALID_VALUE;
  }
  return CUDA_SUCCESS;
}

}  // extern "C"
