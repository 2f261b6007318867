// What the thin hosts around CUTLASS's kernels return: all that a launch needs, without launching.
#pragma once

#include <cuda_runtime.h>

#include <cstring>

#include "cute/tensor.hpp"
#include "cutlass/numeric_types.h"
#include "cutlass/device_kernel.h"
#include "cutlass/kernel_hardware_info.h"

#ifndef GNAFORGE_ELEMENT
#define GNAFORGE_ELEMENT cutlass::half_t  // as the examples have it
#endif
using Element = GNAFORGE_ELEMENT;

/// A launch, as Python reads it.
struct Launch {
  unsigned grid[3], block, shared_bytes, parameter_bytes;
  unsigned char
      parameters[4096];  // starts at a multiple of 8 bytes; tensor maps in it are moved to one of 64 by the caller
};

/// A problem: [batch][tokens][heads][head dim] of Element, [batch][heads][queries] of fp32; `key_heads` divides
/// `heads`.
struct Sizes {
  int batch, heads, key_heads, queries, keys;
};

template <class Kernel>
void describe(const typename Kernel::Params& params, Launch* launch) {
  static_assert(sizeof params <= sizeof launch->parameters);
  dim3 grid = Kernel::get_grid_shape(params);
  *launch = {{grid.x, grid.y, grid.z}, Kernel::get_block_shape().x, Kernel::SharedStorageSize, sizeof params, {}};
  std::memcpy(launch->parameters, &params, sizeof params);
}

// Kernels are only compiled for the device: nothing here launches them.
#ifdef __CUDA_ARCH__
#define GNAFORGE_KERNEL(Kernel) \
  template __global__ void cutlass::device_kernel<Kernel>(const __grid_constant__ Kernel::Params)
#else
#define GNAFORGE_KERNEL(Kernel) static_assert(true)
#endif
#define GNAFORGE_EXPORT extern "C" __attribute__((visibility("default")))
