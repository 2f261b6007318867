// From the settings of a call along one token dimension to bands. Host only, no STL.
//
// G = i - i % stride is the first query of i's group of `stride`, L the length; all within a dilation group of the
// grid.
//
//   setting        query i sees                                                            window * dilation <= length
//   shift          [clamp(G + stride/2 - window/2, 0, L - window), + window)               yes
//   cut            [G + stride/2 - window/2, + window), what of it is in [0, L)            no
//   wrap           [G + stride/2 - window/2, + window), modulo L                           yes; dilation divides length
//   causal token   [clamp(G + stride - window, 0, max(L - window, 0)), i]                  unless it is cut
//   causal block   [max(G + stride - window, 0), min(G + stride, L))                       no
//   sink n         [0, n) too, where causal only up to the end of the above
//
// rules.h refuses what is meaningless, and calls whose queries see keys that are not there.
#pragma once

#include <cstdint>

#include "gnaforge/abi.h"
#include "gnaforge/gna/band.h"

namespace gnaforge {

/// One token dimension of a call, in tokens of the grid: the fields of gnaforge_problem.
struct PatternAxis {
  std::int64_t length;  ///< Of the grid.
  std::int64_t window, stride, dilation;
  std::int64_t edge, causal, sink;
  std::int64_t q_offset, q_tokens;
  std::int64_t kv_offset, kv_tokens, kv_sink;

  PatternAxis() = default;
  PatternAxis(const gnaforge_problem& p, int d)
      : length(p.grid[d]),
        window(p.window[d]),
        stride(p.stride[d]),
        dilation(p.dilation[d]),
        edge(p.edge[d]),
        causal(p.causal[d]),
        sink(p.sink[d]),
        q_offset(p.q_offset[d]),
        q_tokens(p.tokens[d]),
        kv_offset(p.kv_offset[d]),
        kv_tokens(p.kv_tokens[d]),
        kv_sink(p.kv_sink[d]) {
    if (dense()) {
      stride = 1;
      sink = q_offset = kv_offset = kv_sink = 0;
    }
  }

  /// Every query sees every key, wherever it is.
  bool dense() const {
    return window == length && dilation == 1 && causal == GNAFORGE_CAUSAL_NONE && edge != GNAFORGE_EDGE_CUT;
  }

  /// Dilation group of the query tensor's token `row` and those that follow in steps of `dilation`.
  std::int64_t group_of(std::int64_t row) const {
    return dilation == 1 ? 0 : static_cast<int>(row + q_offset) % static_cast<int>(dilation);
  }

  /// And that of the key tensor's token `row`, where it doesn't hold first keys of the grid apart.
  std::int64_t group_of_key(std::int64_t row) const { return remainder(row + kv_offset); }

  /// The key tensor's first token that is in a dilation group.
  std::int64_t first_key(std::int64_t group) const { return remainder(group - kv_offset); }

  /// And the query tensor's, if it has one.
  std::int64_t first_query(std::int64_t group) const { return remainder(group - q_offset); }

 private:
  /// Of `dilation`, not negative.
  std::int64_t remainder(std::int64_t token) const {
    if (dilation == 1) return 0;
    const int rest = static_cast<int>(token) % static_cast<int>(dilation);
    return rest < 0 ? rest + dilation : rest;
  }
};

/// The first position, within dilation group `group`, that is not before position `token` of the grid.
inline int position_in_group(std::int64_t token, std::int64_t group, std::int64_t dilation) {
  const auto distance = static_cast<int>(token - group), step = static_cast<int>(dilation);
  return step == 1 ? distance : distance / step + (distance % step > 0);
}

/// The position, within dilation group `group`, of the first key that is stored. Where the key tensor has the first
/// keys of the grid before others, rows are positions of the grid.
inline int first_key_position(const PatternAxis& axis, std::int64_t group) {
  return axis.kv_sink > 0 ? 0 : position_in_group(axis.kv_offset, group, axis.dilation);
}

/// The band of one dilation group, of a call that rules.h accepts, with positions of at most max_axis_length. Key row 0
/// is at position `kv_begin` of the group.
inline Band band_of(const PatternAxis& axis, std::int64_t group, int kv_begin) {
  const std::int64_t dilation = axis.dilation, far = far_away;
  const std::int64_t length = position_in_group(axis.length, group, dilation);
  const std::int64_t q_begin = position_in_group(axis.q_offset, group, dilation);
  const std::int64_t q_end = position_in_group(axis.q_offset + axis.q_tokens, group, dilation);
  const bool causal = axis.causal != GNAFORGE_CAUSAL_NONE, wraps = axis.edge == GNAFORGE_EDGE_WRAP;
  const std::int64_t lead = causal ? axis.stride - axis.window : axis.stride / 2 - axis.window / 2;
  const std::int64_t zero = -kv_begin, end = length - kv_begin;  // rows of the grid's first position, after its last
  std::int64_t first = lead - kv_begin, ahead = far;
  std::int64_t begin_min = zero, begin_max = far, end_min = -far, end_max = end;
  std::int64_t split = -far, low_begin = far, low_slack = 0, gap = 0;
  // Of the axis, not of the group: a part of another range may be as long by chance.
  const bool whole = axis.kv_offset == 0 && axis.kv_tokens == axis.length;
  if (axis.dense() || (wraps && whole && axis.window == length)) {  // all queries see all keys: no seam
    first = 0;
    begin_max = zero;
    end_min = end;
  } else if (wraps) {
    begin_min = -far;
    end_max = far;
    if (whole) split = gap = length;
  } else if (axis.causal == GNAFORGE_CAUSAL_TOKEN) {
    begin_max = (length > axis.window ? length - axis.window : 0) + zero;
    ahead = 1 + zero;
  } else if (!causal && axis.edge == GNAFORGE_EDGE_SHIFT) {
    begin_max = end - axis.window;
    end_min = zero + axis.window;
  }
  if (axis.sink > 0) {
    split = (axis.sink < length ? axis.sink : length) + zero;
    low_begin = zero;
    low_slack = causal ? 0 : far;
  }
  const auto narrow = [](std::int64_t value) { return static_cast<int>(value); };
  Band band{narrow(q_end - q_begin), make_divisor(narrow(axis.stride)),
            narrow(q_begin),         narrow(first),
            narrow(axis.window),     narrow(begin_min),
            narrow(begin_max),       narrow(end_min),
            narrow(end_max),         narrow(ahead),
            narrow(split),           narrow(low_begin),
            narrow(low_slack),       narrow(gap)};
  // Windows are all among the first keys, or none is.
  if (axis.kv_sink > 0 && band.queries > 0 && window(band, band.queries - 1).end > axis.kv_sink)
    band.gap = narrow(axis.kv_offset - axis.kv_sink);
  return band;
}

/// With rows counted from the first key that is stored.
inline Band band_of(const PatternAxis& axis, std::int64_t group) {
  return band_of(axis, group, first_key_position(axis, group));
}

/// The queries along an axis, all that AxisQTiles looks at: their groups are numbered from the tensor's first token on.
inline Axis query_axis(const PatternAxis& axis) {
  const auto tokens = static_cast<int>(axis.q_tokens);
  return {tokens, 1, divisor_of<1>(), static_cast<int>(axis.dilation), false};
}

/// The keys along an axis, likewise.
inline Axis key_axis(const PatternAxis& axis) {
  const auto tokens = static_cast<int>(axis.kv_tokens);
  return {tokens, 1, divisor_of<1>(), static_cast<int>(axis.dilation), false};
}

/// The bands of an axis. Of the whole grid there are only two kinds of groups, so a Q tile need not make its own.
struct AxisBands {
  PatternAxis axis;
  bool whole;
  std::int64_t long_groups;  ///< So many groups, the first ones, are one token longer than the rest.
  Band band[2];              ///< Of a long group and of another, where all is there.

  AxisBands() = default;
  explicit AxisBands(const PatternAxis& from)
      : axis(from),
        whole(axis.q_offset == 0 && axis.kv_offset == 0 && axis.kv_sink == 0 && axis.q_tokens == axis.length &&
              axis.kv_tokens == axis.length),
        long_groups(axis.length % axis.dilation) {
    if (!whole) return;
    band[0] = band_of(axis, 0);
    band[1] = long_groups > 0 && axis.dilation > 1 ? band_of(axis, axis.dilation - 1) : band[0];
  }

  Band of(std::int64_t group) const { return whole ? band[group >= long_groups] : band_of(axis, group); }
};

}  // namespace gnaforge
