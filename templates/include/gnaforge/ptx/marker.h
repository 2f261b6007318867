// Markers for the emulator's counters; no instruction in builds for a GPU. Device only.
#pragma once

namespace gnaforge::ptx {

enum class Marker { tile_begins = 1, tile_is_shell = 2, tile_ends = 3 };

template <Marker What>
__device__ __forceinline__ void mark() {
#if defined(GNAFORGE_EMULATED)
  asm volatile("pmevent %0;" ::"n"(static_cast<int>(What)));
#endif
}

}  // namespace gnaforge::ptx
