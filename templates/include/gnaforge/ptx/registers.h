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

/// True in one lane of the warp, all of whose lanes are here.
__device__ __forceinline__ bool elect() {
  int chosen;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.s32 %0, 1, 0, p;\n"
      "}"
      : "=r"(chosen));
  return chosen != 0;
}

/// Waits until the launches before this one have ended and what they wrote is there to see, where this one may begin
/// before (PTX ISA, griddepcontrol); else it does nothing.
__device__ __forceinline__ void wait_for_grids() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

/// What the launch before may have written: not from a cache that is older.
__device__ __forceinline__ int load_word(const int* from) {
  int word;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(word) : "l"(from) : "memory");
  return word;
}

/// threadIdx.x, read anew: what follows from it is not kept in registers from one use to the next.
__device__ __forceinline__ int reload_thread_index() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

/// A bit for each lane of the warp with a higher number; read anew, too.
__device__ __forceinline__ unsigned lanes_above() {
  unsigned lanes;
  asm volatile("mov.u32 %0, %%lanemask_gt;" : "=r"(lanes));
  return lanes;
}

}  // namespace gnaforge::ptx
