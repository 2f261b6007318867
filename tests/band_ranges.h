// Every range of the queries of an axis, with the keys that they need and some more.
#pragma once

#include "band_checks.h"
#include "gnaforge/pattern.h"
#include "gnaforge/rules.h"

namespace {

/// Of the grid's positions: keys [0, head), then [begin, end). Beyond the grid's ends they are further images.
struct Keys {
  int head, begin, end;
};

/// All that `check_every_range` knows of an axis: queries [0, length) by positions [-length, 2 * length).
struct Grid {
  const gnaforge_problem& whole;
  std::vector<Bits> seen;
  int length, dilation;
  bool wraps, dense;

  Grid(const gnaforge_problem& problem, const std::uint8_t* data)
      : whole(problem),
        length(static_cast<int>(problem.grid[0])),
        dilation(static_cast<int>(problem.dilation[0])),
        wraps(problem.edge[0] == GNAFORGE_EDGE_WRAP),
        dense(PatternAxis(problem, 0).dense()) {
    for (int query = 0; query < length; ++query) {
      seen.push_back(0);
      for (int i = 0; i < 3 * length; ++i) seen.back() |= Bits{*data++ != 0} << i;
    }
  }

  bool is_whole(const Keys& keys) const { return keys.head == 0 && keys.begin == 0 && keys.end == length; }

  /// Which of these positions are there.
  Bits stored(const Keys& keys) const {
    return ones(length, length + keys.head) | ones(length + keys.begin, length + keys.end);
  }

  /// Which of the key tensor's tokens a query sees.
  Bits row(int query, const Keys& keys) const {
    const Bits all = seen[static_cast<std::size_t>(query)];
    if (wraps && is_whole(keys)) return (all | all >> length | all >> 2 * length) & ones(0, length);
    const Bits body = all >> (length + keys.begin) & ones(0, keys.end - keys.begin);
    return (all >> length & ones(0, keys.head)) | body << keys.head;
  }

  gnaforge_problem call(Interval queries, const Keys& keys) const {
    gnaforge_problem problem = whole;
    problem.q_offset[0] = queries.begin;
    problem.tokens[0] = queries.end - queries.begin;
    problem.kv_sink[0] = keys.head;
    problem.kv_offset[0] = keys.begin;
    problem.kv_tokens[0] = keys.head + keys.end - keys.begin;
    return problem;
  }
};

inline int floor_mod(int a, int b) { return a - floor_div(a, b) * b; }

/// The interval of all bits that are set, the first of which stands for `origin`.
inline Interval hull_of(Bits bits, int origin) {
  Interval hull{0, 0};
  for (int i = 0; i < most_rows; ++i)
    if (bits >> i & 1) hull = {hull.begin < hull.end ? hull.begin : origin + i, origin + i + 1};
  return hull;
}

/// A call that rules.h takes: bands of all dilation groups, with one size of tiles after another.
inline void check_range(const Grid& grid, Interval queries, const Keys& keys, const gnaforge_problem& problem,
                        Report& report) {
  const AxisBands bands{PatternAxis(problem, 0)};
  const auto tokens = static_cast<int>(problem.kv_tokens[0]);
  int rows = 0;
  for (int group = 0; group < grid.dilation; ++group) {
    const Band band = bands.of(group);
    if (band.queries == 0) continue;
    Mask mask;
    const int first = floor_mod(group - keys.begin, grid.dilation);  // of the key tensor's tokens in the group
    mask.keys = first < tokens ? ceil_div(tokens - first, grid.dilation) : 0;
    for (int q = queries.begin + floor_mod(group - queries.begin, grid.dilation); q < queries.end; q += grid.dilation) {
      const Bits all = grid.row(q, keys);
      Bits own = grid.dilation == 1 ? all : 0;
      for (int key = 0; key < mask.keys && grid.dilation > 1; ++key)
        own |= (all >> (first + key * grid.dilation) & 1) << key;
      mask.add_row(own);
    }
    rows += mask.queries;
    report.errors[0] += band.queries != mask.queries;
    if (band.queries != mask.queries) continue;
    const int q_extent = q_extents[report.ranges % 6], extent = extents[report.ranges / 6 % 8];
    for (int q = 0; q < mask.queries; q += q_extent) check_q_tile(band, mask, q, q_extent, extent, report);
    if (keys.head > 0) continue;  // columns would not be neighbours
    check_columns(band, mask, report);
    for (int k = 0; k < mask.keys; k += extent) check_kv_tile(band, mask, k, extent, q_extent, report);
  }
  report.errors[0] += rows != queries.end - queries.begin;
  ++report.ranges;
}

/// Some keys for a range of queries that see these positions: those that rules.h must take are checked, others must be
/// refused.
inline void check_keys(const Grid& grid, Interval queries, Bits seen, const Keys& keys, Report& report) {
  if (keys.end <= keys.begin || (!grid.wraps && keys.end > grid.length)) return;
  if (keys.begin < (grid.wraps ? -grid.length : keys.head)) return;
  const gnaforge_problem problem = grid.call(queries, keys);
  const auto wrong = [&report] {
    std::int64_t sum = 0;
    for (const std::int64_t errors : report.errors) sum += errors;
    return sum;
  };
  const std::int64_t before = wrong();
  const bool taken = rules::problem(problem, {nullptr, 0}) == GNAFORGE_OK;
  report.errors[8] += taken != ((grid.wraps && grid.is_whole(keys)) || (seen & ~grid.stored(keys)) == 0);
  if (taken) check_range(grid, queries, keys, problem, report);
  if (before > 0 || wrong() == 0) return;
  const std::int64_t first[] = {queries.begin, queries.end, keys.begin, keys.end, keys.head};
  for (int i = 0; i < 5; ++i) report.first[i] = first[i];
}

/// All ranges of the queries of an axis. Their keys: as few as they need, one less and one more at either end, the
/// whole grid; and apart from the grid's first `apart`, even if nothing else is seen.
inline void check_every_range(const gnaforge_problem& whole, const std::uint8_t* seen, int apart, Report& report) {
  const Grid grid(whole, seen);
  if (grid.dense) return;
  if (grid.wraps || grid.dilation > 1) apart = 0;  // refused
  for (int first = 0; first < grid.length; ++first) {
    Bits all = 0;
    for (int end = first + 1; end <= grid.length; ++end) {
      all |= grid.seen[static_cast<std::size_t>(end - 1)];
      const Interval queries{first, end}, hull = hull_of(all, -grid.length);
      const Interval body = hull_of(all & ~ones(0, grid.length + apart), -grid.length);
      for (const int low : {0, 1, -1})
        for (const int high : {0, 1, -1}) {
          if (low != 0 && high != 0) continue;
          check_keys(grid, queries, all, {0, hull.begin + low, hull.end + high}, report);
          if (apart > 0 && body.begin < body.end)
            check_keys(grid, queries, all, {apart, body.begin + low, body.end + high}, report);
        }
      if (apart > 0 && body.begin >= body.end) check_keys(grid, queries, all, {apart, apart + 1, apart + 2}, report);
      if (!grid.is_whole({0, hull.begin, hull.end})) check_keys(grid, queries, all, {0, 0, grid.length}, report);
    }
  }
}

}  // namespace
