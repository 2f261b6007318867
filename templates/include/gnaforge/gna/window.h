// Windows of Generalized Neighborhood Attention along one token dimension (GNA, arXiv 2504.16922, section 3), with
// the border behaviour of NATTEN: a window that would leave the layout is shifted inwards, never cut.
// Positions are within a dilation group (see group_axis). Host and device, no torch, no STL.
#pragma once

#include "gnaforge/gna/axis.h"

namespace gnaforge {

/// Keys that query `query` sees. Not causal: exactly axis.window of them. Both ends grow with `query`.
GNAFORGE_HD Interval window(const Axis& axis, int query) {
  const int group_begin = axis.stride.floor(query);
  if (axis.causal) {
    const int leader = min_int(group_begin + axis.stride.value - 1, axis.length - 1);
    return {max_int(leader - axis.window + 1, 0), query + 1};
  }
  const int leader = min_int(group_begin + axis.stride.value / 2, axis.length - 1);
  const int begin = min_int(max_int(leader - axis.window / 2, 0), axis.length - axis.window);
  return {begin, begin + axis.window};
}

/// Queries that see key `key`: the transpose of `window`, an interval because both its ends are monotone.
GNAFORGE_HD Interval transposed_window(const Axis& axis, int key) {
  const Divisor stride = axis.stride;
  if (axis.causal) {
    // A stride group still sees the key while its leader, the group's last query, is less than a window ahead.
    const int past = key + axis.window;
    return {key, past >= axis.length ? axis.length : stride.floor(past)};
  }
  const int left = axis.window / 2;
  const int right = axis.window - 1 - left;
  const int lead = stride.value - stride.value / 2 - 1;  // from a group's leader to its last query
  const int begin = key < axis.window ? 0 : stride.floor(key - right + lead);
  const int end = key >= axis.length - axis.window ? axis.length : stride.floor(key + left + lead + 1);
  return {begin, end};
}

}  // namespace gnaforge
