// Bands and their tiles, beside masks that somebody else made, for test_bands.py.
#include <cstdint>
#include <vector>

#include "gnaforge/cpu/row_set.h"
#include "gnaforge/pattern_counts.h"

using namespace gnaforge;

namespace {

/// Of the first axis of a problem.
struct Report {
  std::int64_t tiles, interior, extra_tiles;
  std::int64_t errors[8];
};

Interval row_range(const Band& band, int query, int origin, int extent) {
  const Interval keys = on_side(band, window(band, query), origin);
  return {max_int(keys.begin - origin, 0), min_int(keys.end - origin, extent)};
}

/// A mask [queries, keys] of one dilation group.
struct Mask {
  const std::uint8_t* data;
  int queries, keys;
  bool at(int query, int key) const { return data[query * keys + key] != 0; }
};

void check_q_tile(const Band& band, const Mask& mask, int q_begin, int q_extent, int extent, Report& report) {
  const AxisRuns runs = axis_runs(band, q_begin, q_extent, extent);
  const int q_end = min_int(q_begin + q_extent, mask.queries);
  std::vector<int> seen(static_cast<std::size_t>(q_extent) * static_cast<std::size_t>(mask.keys)), origins;
  for (int index = 0; index < runs.count; ++index) {
    const int origin = runs.origin(index, extent);
    for (const int other : origins) report.errors[0] += other == origin;  // a tile twice
    origins.push_back(origin);
    const Interval rows = runs.rows(index, extent);
    const bool interior = index >= runs.interior.begin && index < runs.interior.end;
    bool full = true;
    Interval any{extent, 0};
    for (int q = q_begin; q < q_end; ++q) {
      const Interval range = row_range(band, q, origin, extent);
      full = full && range.begin == 0 && range.end == extent;
      for (int t = range.begin; t < range.end; ++t) {
        any = {min_int(any.begin, t), max_int(any.end, t + 1)};
        const int key = stored_row(band, origin, extent) + t;
        if (key < 0 || key >= mask.keys)
          ++report.errors[1];  // visible, but not there
        else
          ++seen[static_cast<std::size_t>((q - q_begin) * mask.keys + key)];
      }
    }
    // The rows that count are those that somebody sees, and are where they are stored.
    report.errors[2] += rows.begin - origin != any.begin || rows.end - origin != any.end;
    report.errors[3] +=
        stored_row(band, rows.begin, rows.end - rows.begin) != stored_row(band, origin, extent) + rows.begin - origin;
    report.errors[4] += interior != full;
    report.interior += interior;
    ++report.tiles;
  }
  int least = 0;  // tiles that any cover of the visible keys takes, without a seam
  for (int key = 0; key < mask.keys; ++key) {
    bool any = false;
    for (int q = q_begin; q < q_end; ++q) any = any || mask.at(q, key);
    if (any) ++least, key += extent - 1;
  }
  report.extra_tiles += runs.count - least;
  for (int q = q_begin; q < q_end; ++q)
    for (int key = 0; key < mask.keys; ++key)  // each visible pair once, others never
      report.errors[5] += seen[static_cast<std::size_t>((q - q_begin) * mask.keys + key)] != mask.at(q, key);
}

/// Images of a key: rows that stand for it, of which one is where it is stored.
int images(const Band& band) { return band.gap != 0 ? 1 : 0; }

void check_columns(const Band& band, const Mask& mask, Report& report) {
  for (int key = 0; key < mask.keys; ++key) {
    std::vector<int> seen(static_cast<std::size_t>(mask.queries));
    int parts = 0;
    for (int image = -images(band); image <= images(band); ++image) {
      const Interval queries = transposed_window(band, key + image * band.gap);
      parts += queries.begin < queries.end;
      for (int q = queries.begin; q < queries.end; ++q) ++seen[static_cast<std::size_t>(q)];
    }
    report.errors[6] += parts > 2;
    for (int q = 0; q < mask.queries; ++q) report.errors[6] += seen[static_cast<std::size_t>(q)] != mask.at(q, key);
  }
}

void check_kv_tile(const Band& band, const Mask& mask, int k_begin, int k_extent, int extent, Report& report) {
  const int k_end = min_int(k_begin + k_extent, mask.keys);
  std::vector<int> seen(static_cast<std::size_t>(k_extent) * static_cast<std::size_t>(mask.queries));
  for (int image = -images(band); image <= images(band); ++image) {
    const int shift = image * band.gap;
    const AxisQueries tiles = axis_queries(band, k_begin + shift, k_extent, mask.keys + shift, extent);
    for (int tile = 0; tile < tiles.count; ++tile) {
      const int origin = tiles.visited.begin + tile * extent;
      bool full = true;
      for (int key = k_begin; key < k_end; ++key) {
        const Interval queries = transposed_window(band, key + shift);
        for (int q = origin; q < origin + extent; ++q) {
          const bool sees = q >= queries.begin && q < queries.end;
          full = full && sees;
          if (sees) ++seen[static_cast<std::size_t>((key - k_begin) * mask.queries + q)];
        }
      }
      report.errors[7] += full != (tile >= tiles.interior.begin && tile < tiles.interior.end);
    }
  }
  for (int key = k_begin; key < k_end; ++key)
    for (int q = 0; q < mask.queries; ++q)
      report.errors[7] += seen[static_cast<std::size_t>((key - k_begin) * mask.queries + q)] != mask.at(q, key);
}

template <class Tile>
void split(int index, const int (&shape)[Tile::rank], int (&coordinates)[Tile::rank]) {
  for (int d = Tile::rank - 1; d >= 0; --d) {
    coordinates[d] = index % shape[d];
    index /= shape[d];
  }
}

/// All tiles of one dilation group per axis, as a kernel walks over them. Adds to [queries, keys] how often RowMask and
/// RowSet call a pair visible. Returns how often something is wrong with a tile.
template <class QTile, class KvTile>
int visit(const gnaforge_problem& problem, const std::int64_t* groups, const int* keys, int* row_mask, int* row_set) {
  using Source = BandTiles<QTile, KvTile>;
  constexpr int rank = QTile::rank;
  Band band[rank];
  int q_tiles[rank], extents[rank], box[rank], q_tile_count = 1, key_count = 1, wrong = 0;
  for (int d = 0; d < rank; ++d) {
    band[d] = band_of(PatternAxis(problem, d), groups[d]);
    extents[d] = QTile::extent(d);
    q_tiles[d] = ceil_div(band[d].queries, extents[d]);
    q_tile_count *= q_tiles[d];
    key_count *= keys[d];
  }
  for (int q_tile = 0; q_tile < q_tile_count; ++q_tile) {
    int q_begin[rank];
    split<QTile>(q_tile, q_tiles, q_begin);
    for (int d = 0; d < rank; ++d) q_begin[d] *= extents[d];
    const typename Source::List list = Source::list(band, q_begin);
    const cpu::TileRows<Source> tile_rows(band, q_begin);
    typename Source::Walk walk;
    walk.begin(list);
    for (int index = 0; index < list.count; ++index) {
      if (index > 0) walk.step(list, index);
      int origin[rank], stored[rank], used[rank];
      std::vector<cpu::RowSet<QTile>> sets[rank];
      for (int d = 0; d < rank; ++d) {
        origin[d] = Source::origin(list, walk, d);
        const Interval rows = Source::rows(list, walk, d);
        used[d] = rows.end - rows.begin;
        box[d] = stored_row(band[d], origin[d], KvTile::extent(d));
        stored[d] = stored_row(band[d], rows.begin, used[d]);
        sets[d].resize(static_cast<std::size_t>(used[d]));
        tile_rows.rows_that_see(d, rows.begin, used[d], sets[d].data());
      }
      for (int row = 0; row < QTile::volume; ++row) {
        int query[rank], query_index = 0;
        split<QTile>(row, extents, query);
        bool exists = true;
        Interval seen[rank];
        for (int d = 0; d < rank; ++d) {
          query[d] += q_begin[d];
          exists = exists && query[d] < band[d].queries;
          query_index = query_index * band[d].queries + query[d];
          seen[d] = Source::seen(band[d], Source::row(band[d], query[d]), origin[d]);
        }
        const RowMask<KvTile> mask = Source::mask(seen);
        for (int column = 0; column < KvTile::volume && exists; ++column) {
          const bool shown = (mask.word(column / 32) >> (column % 32) & 1) != 0;
          wrong += !shown && Source::kind(list, index) == TileKind::interior;
          bool there = true;
          int key_index = 0;
          for (int d = 0; d < rank; ++d) {
            const int key = box[d] + column / KvTile::pitch(d) % KvTile::extent(d);
            there = there && key >= 0 && key < keys[d];
            key_index = key_index * keys[d] + key;
          }
          wrong += shown && !there;
          if (shown && there) ++row_mask[query_index * key_count + key_index];
        }
        int volume = 1;
        for (int d = 0; d < rank; ++d) volume *= used[d];
        for (int column = 0; column < volume; ++column) {
          int key[rank], key_index = 0;
          split<QTile>(column, used, key);
          bool shown = true;
          for (int d = 0; d < rank; ++d) {
            const cpu::RowSet<QTile>& set = sets[d][static_cast<std::size_t>(key[d])];
            shown = shown && (set.word[row / 64] >> (row % 64) & 1) != 0;
            const int place = stored[d] + key[d];
            wrong += place < 0 || place >= keys[d];
            key_index = key_index * keys[d] + place;
          }
          if (!exists)
            wrong += shown;
          else if (shown)
            ++row_set[query_index * key_count + key_index];
        }
      }
    }
  }
  return wrong;
}

template <class QTile, class KvTile>
void count(const gnaforge_problem& problem, TileCounts& out) {
  PatternAxis axis[QTile::rank];
  for (int d = 0; d < QTile::rank; ++d) axis[d] = PatternAxis(problem, d);
  out = count_tiles<QTile, KvTile>(axis);
}

struct Shape {
  int rank;
  const int* q_tile;
  const int* kv_tile;
  int (*visit)(const gnaforge_problem&, const std::int64_t*, const int*, int*, int*);
  void (*count)(const gnaforge_problem&, TileCounts&);
};

template <class QTile, class KvTile>
constexpr Shape shape() {
  return {QTile::rank, QTile::extents, KvTile::extents, visit<QTile, KvTile>, count<QTile, KvTile>};
}

const Shape shapes[] = {
    shape<Box<1>, Box<1>>(),
    shape<Box<4>, Box<3>>(),
    shape<Box<16>, Box<33>>(),
    shape<Box<4, 4>, Box<2, 8>>(),
    shape<Box<3, 5>, Box<5, 7>>(),
    shape<Box<1, 16>, Box<1, 40>>(),
    shape<Box<2, 2, 2>, Box<2, 1, 2>>(),
    shape<Box<4, 1, 3>, Box<1, 4, 33>>(),
};

}  // namespace

extern "C" {

int shape_count() { return static_cast<int>(sizeof(shapes) / sizeof(shapes[0])); }
const Shape* shape_at(int index) { return &shapes[index]; }
int visit_tiles(int index, const gnaforge_problem* problem, const std::int64_t* groups, const int* keys, int* row_mask,
                int* row_set) {
  return shapes[index].visit(*problem, groups, keys, row_mask, row_set);
}
void count_all_tiles(int index, const gnaforge_problem* problem, TileCounts* out) {
  shapes[index].count(*problem, *out);
}

/// Stores the queries of a group, and its first tokens in the query and the key tensor. Returns the fields of its band.
void describe_group(const gnaforge_problem* problem, std::int64_t group, int* queries, std::int64_t* first_key) {
  const PatternAxis axis(*problem, 0);
  *queries = band_of(axis, group).queries;
  *first_key = axis.first_key(group);
}

/// The tiles of a Q tile, and their first rows.
void runs_of(const gnaforge_problem* problem, std::int64_t group, int q_begin, int q_extent, int extent,
             AxisRuns* out) {
  *out = axis_runs(band_of(PatternAxis(*problem, 0), group), q_begin, q_extent, extent);
}
void origins_of(const AxisRuns* runs, int extent, int* origins) {
  for (int index = 0; index < runs->count; ++index) origins[index] = runs->origin(index, extent);
}

/// All tiles, rows and columns of a group whose mask is [queries, keys]. Where the first keys of the grid are stored
/// apart, keys have no columns: rows of a KV tile would not be neighbours.
void check_axis(const gnaforge_problem* problem, std::int64_t group, const std::uint8_t* data, int keys, int thorough,
                Report* report) {
  const Band band = band_of(PatternAxis(*problem, 0), group);
  const Mask mask{data, band.queries, keys};
  const bool columns = problem->kv_sink[0] == 0;
  if (columns) check_columns(band, mask, *report);
  const int step = thorough ? 1 : 3;
  const int q_extents[] = {2, 1, 3, 5, 8, 16}, extents[] = {3, 1, 2, 4, 5, 8, 16, 32};
  for (int i = 0; i < 6; i += step)
    for (int j = 0; j < 8; j += step) {
      for (int q = 0; q < mask.queries; q += q_extents[i])
        check_q_tile(band, mask, q, q_extents[i], extents[j], *report);
      for (int k = 0; k < keys && columns; k += extents[j])
        check_kv_tile(band, mask, k, extents[j], q_extents[i], *report);
    }
}

/// Of the longest axes there are: nothing overflows (the build ends the process where something does), and tiles hold
/// what is visible.
int check_long_axis(const gnaforge_problem* problem) {
  const Band band = band_of(PatternAxis(*problem, 0), 0);
  const auto keys = static_cast<int>(problem->kv_tokens[0]);
  int wrong = 0;
  for (const int q_begin : {0, 64, band.queries / 2 / 64 * 64, (band.queries - 1) / 64 * 64}) {
    const AxisRuns runs = axis_runs(band, q_begin, 64, 128);
    wrong += runs.count < 1 || runs.interior.begin < 0 || runs.interior.end > runs.count;
    const int query = min_int(q_begin + 63, band.queries - 1);
    for (const int index : {0, runs.interior.begin, runs.interior.end - 1, runs.count - 1}) {
      if (index < 0) continue;
      const int origin = runs.origin(index, 128), box = stored_row(band, origin, 128);
      const Interval range = row_range(band, query, origin, 128);
      wrong += range.begin < range.end && (box + range.begin < 0 || box + range.end > keys);
      wrong += index >= runs.interior.begin && index < runs.interior.end && (range.begin != 0 || range.end != 128);
    }
    for (int image = -images(band); image <= images(band); ++image) {
      const AxisQueries queries = axis_queries(band, q_begin + image * band.gap, 128, keys + image * band.gap, 64);
      wrong += queries.count < 0 || queries.interior.end > queries.count;
    }
  }
  return wrong;
}

}  // extern "C"
