// What kernels on CUTLASS's mainloops share. Device only.
#pragma once

#include <cutlass/numeric_types.h>

#include "gnaforge/gpu/element.h"
#include "gnaforge/ptx/marker.h"

namespace gnaforge::gpu {

/// CUTLASS's name of a dtype that element.h has.
template <gnaforge_dtype Dtype>
struct CutlassElement {
  static_assert(is_known<Dtype>, "CUTLASS's type of this dtype is not in gpu/cutlass.h");
};
template <>
struct CutlassElement<GNAFORGE_BF16> {
  using type = cutlass::bfloat16_t;
};
template <>
struct CutlassElement<GNAFORGE_FP16> {
  using type = cutlass::half_t;
};

/// For the emulator: tiles can be counted, but no instructions on them, for CUTLASS's loops over them can't be marked.
/// So nothing may stand between the marks, a branch neither.
__device__ __forceinline__ void count_tile(bool shell) {
  using ptx::mark, ptx::Marker;
  if (shell) {
    mark<Marker::tile_begins>();
    mark<Marker::tile_is_shell>();
    mark<Marker::tile_ends>();
  } else {
    mark<Marker::tile_begins>();
    mark<Marker::tile_ends>();
  }
}

}  // namespace gnaforge::gpu
