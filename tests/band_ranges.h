// Every range of the queries of an axis, with the keys that they need and some more.
#pragma once

#include "band_checks.h"
#include "gnaforge/pattern.h"
#include "gnaforge/rules.h"

namespace {

/// Of the grid's positions: keys [0, head), then [begin, end). Beyond the grid's ends they are further images.
struct Keys {
  int head, begin, end;
  bool holds(int position) const { return (position >= begin && position < end) || (position >= 0 && position < head); }
};

/// All that `check_every_range` knows of an axis: queries [0, length) by positions [-length, 2 * length).
struct Grid {
  const gnaforge_problem& whole;
  const std::uint8_t* seen;
  int length, dilation;
  bool wraps, dense;

  Grid(const gnaforge_problem& problem, const std::uint8_t* data)
      : whole(problem),
        seen(data),
        length(static_cast<int>(problem.grid[0])),
        dilation(static_cast<int>(problem.dilation[0])),
        wraps(problem.edge[0] == GNAFORGE_EDGE_WRAP),
        dense(PatternAxis(problem, 0).dense()) {}

  bool at(int query, int position) const { return seen[query * 3 * length + position + length] != 0; }

  /// Whether all that is seen is there.
  bool complete(Interval queries, const Keys& keys) const {
    if (is_whole(keys)) return true;
    for (int q = queries.begin; q < queries.end; ++q)
      for (int position = -length; position < 2 * length; ++position)
        if (at(q, position) && !keys.holds(position)) return false;
    return true;
  }

  bool is_whole(const Keys& keys) const { return keys.head == 0 && keys.begin == 0 && keys.end == length; }

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

/// A call that rules.h takes: bands of all dilation groups, with one size of tiles after another.
inline void check_range(const Grid& grid, Interval queries, const Keys& keys, const gnaforge_problem& problem,
                        Report& report) {
  const AxisBands bands{PatternAxis(problem, 0)};
  const bool folds = grid.wraps && grid.is_whole(keys);
  std::vector<std::uint8_t> data;
  std::int64_t rows = 0;
  for (int group = 0; group < grid.dilation; ++group) {
    const Band band = bands.of(group);
    if (band.queries == 0) continue;
    std::vector<int> positions;  // of the group's keys, as they are stored
    for (int key = 0; key < problem.kv_tokens[0]; ++key) {
      const int position = key < keys.head ? key : key - keys.head + keys.begin;
      if ((position - group) % grid.dilation == 0) positions.push_back(position);
    }
    Mask mask{nullptr, 0, static_cast<int>(positions.size())};
    data.clear();
    for (int q = queries.begin; q < queries.end; ++q) {
      if ((q - group) % grid.dilation != 0) continue;
      ++mask.queries;
      for (const int position : positions) {
        const bool image = folds && (grid.at(q, position - grid.length) || grid.at(q, position + grid.length));
        const bool inside = position >= -grid.length && position < 2 * grid.length;
        data.push_back(inside && (grid.at(q, position) || image));
      }
    }
    report.errors[0] += band.queries != mask.queries;
    rows += mask.queries;
    mask.data = data.data();
    const int q_extent = q_extents[report.ranges % 6], extent = extents[report.ranges / 6 % 8];
    for (int q = 0; q < mask.queries; q += q_extent) check_q_tile(band, mask, q, q_extent, extent, report);
    if (keys.head > 0) continue;  // columns would not be neighbours
    check_columns(band, mask, report);
    for (int k = 0; k < mask.keys; k += extent) check_kv_tile(band, mask, k, extent, q_extent, report);
  }
  report.errors[0] += rows != queries.end - queries.begin;
  ++report.ranges;
}

/// Some keys for a range of queries: those that rules.h must take are checked, others must be refused.
inline void check_keys(const Grid& grid, Interval queries, const Keys& keys, Report& report) {
  if (keys.end <= keys.begin || (!grid.wraps && keys.end > grid.length)) return;
  if (keys.begin < (grid.wraps ? -grid.length : keys.head)) return;
  const gnaforge_problem problem = grid.call(queries, keys);
  const auto wrong = [&report] {
    std::int64_t sum = 0;
    for (const std::int64_t errors : report.errors) sum += errors;
    return sum;
  };
  const std::int64_t before = wrong();
  char why[512];
  const bool taken = rules::problem(problem, {why, sizeof(why)}) == GNAFORGE_OK;
  report.errors[8] += taken != grid.complete(queries, keys);
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
    Interval hull{3 * grid.length, -grid.length}, body = hull;
    for (int end = first + 1; end <= grid.length; ++end) {
      for (int position = -grid.length; position < 2 * grid.length; ++position) {
        if (!grid.at(end - 1, position)) continue;
        hull = {min_int(hull.begin, position), max_int(hull.end, position + 1)};
        if (position >= apart) body = {min_int(body.begin, position), max_int(body.end, position + 1)};
      }
      const Interval queries{first, end};
      for (const int low : {0, 1, -1})
        for (const int high : {0, 1, -1}) {
          if (low != 0 && high != 0) continue;
          check_keys(grid, queries, {0, hull.begin + low, hull.end + high}, report);
          if (apart > 0 && body.begin < body.end)
            check_keys(grid, queries, {apart, body.begin + low, body.end + high}, report);
        }
      if (apart > 0 && body.begin >= body.end) check_keys(grid, queries, {apart, apart + 1, apart + 2}, report);
      if (!grid.is_whole({0, hull.begin, hull.end})) check_keys(grid, queries, {0, 0, grid.length}, report);
    }
  }
}

}  // namespace
