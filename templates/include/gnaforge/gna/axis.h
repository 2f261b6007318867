// The shape of a GNA problem along its token dimensions. Host and device, no torch, no STL.
#pragma once

#include "gnaforge/gna/divisor.h"

// Before a loop over axes: an array that a loop indexes lives in memory unless the loop is unrolled.
#if defined(__CUDA_ARCH__)
#define GNAFORGE_UNROLL _Pragma("unroll")
#else
#define GNAFORGE_UNROLL
#endif

namespace gnaforge {

/// One token dimension: `length` tokens, of which a query sees at most `window`, in steps of `dilation`;
/// `stride` consecutive queries share one window. All in tokens.
/// Constraints: 1 <= stride <= window, 1 <= dilation, window * dilation <= length <= max_axis_length.
struct Axis {
  int length;
  int window;
  Divisor stride;
  int dilation;
  bool causal;
};

/// Longest token dimension: sums of two positions must fit an int.
constexpr int max_axis_length = (1 << 30) - 1;

/// Half-open range of token positions; empty where end <= begin.
struct Interval {
  int begin;
  int end;
};

/// Extents of a tile, fixed at compile time: query or key tokens per token dimension, outermost first.
template <int... Extents>
struct Box {
  static constexpr int rank = sizeof...(Extents);
  static constexpr int extents[rank] = {Extents...};
  static constexpr int volume = (1 * ... * Extents);

  /// extents[axis] in device code, which cannot index the static array; a local one would live in memory.
  GNAFORGE_HD static constexpr int extent(int axis) {
    int found = 0, index = 0;
    ((found = index++ == axis ? Extents : found), ...);
    return found;
  }

  /// extent(axis) to divide by; worked out by the compiler, whatever `axis` is.
  GNAFORGE_HD static constexpr Divisor divisor(int axis) {
    Divisor found{};
    int index = 0;
    ((found = index++ == axis ? divisor_of<Extents>() : found), ...);
    return found;
  }

  /// Elements between neighbours along `axis` when the box is stored row-major.
  GNAFORGE_HD static constexpr int pitch(int axis) {
    int elements = 1, index = 0;  // without a loop, which device code would run
    ((elements *= index++ > axis ? Extents : 1), ...);
    return elements;
  }
};

GNAFORGE_HD constexpr int min_int(int a, int b) { return a < b ? a : b; }
GNAFORGE_HD constexpr int max_int(int a, int b) { return a > b ? a : b; }
GNAFORGE_HD constexpr int ceil_div(int a, int b) { return a / b + (a % b != 0); }

/// Tokens of dilation group `group`: those at positions group, group + dilation, ... below length.
GNAFORGE_HD int group_length(const Axis& axis, int group) {
  return axis.length / axis.dilation + (group < axis.length % axis.dilation);
}

/// The axis that one dilation group forms by itself: window and stride act on positions within the group, and
/// windows clamp at the group's own end.
GNAFORGE_HD Axis group_axis(const Axis& axis, int group) {
  return Axis{group_length(axis, group), axis.window, axis.stride, 1, axis.causal};
}

}  // namespace gnaforge
