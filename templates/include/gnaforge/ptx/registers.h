// Registers: how many a warpgroup has, and special ones. Device only.
#pragma once

namespace gnaforge::ptx {

template <int Count>
__device__ __forceinline__ void registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

template <int Count>
__device__ __forceinline__ void registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}

/// threadIdx.x, read anew: what follows from it is not kept in registers from one use to the next.
__device__ __forceinline__ int reload_thread_index() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

}  // namespace gnaforge::ptx
