// Bands and their tiles, beside masks that somebody else made, for test_bands.py.
#include <cstdint>
#include <vector>

#include "band_ranges.h"
#include "gnaforge/cpu/row_set.h"
#include "gnaforge/pattern_counts.h"

using namespace gnaforge;

namespace {

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
        unsigned mask[RowMask<KvTile>::words];
        RowMask<KvTile>::find(seen, mask);
        for (int column = 0; column < KvTile::volume && exists; ++column) {
          const bool shown = (mask[column / 32] >> (column % 32) & 1) != 0;
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
/// Of all Q tiles.
void all_runs(const gnaforge_problem* problem, std::int64_t group, int q_extent, int extent, AxisRuns* out) {
  const Band band = band_of(PatternAxis(*problem, 0), group);
  for (int q = 0; q < band.queries; q += q_extent) *out++ = axis_runs(band, q, q_extent, extent);
}
void origins_of(const AxisRuns* runs, int extent, int* origins) {
  for (int index = 0; index < runs->count; ++index) origins[index] = runs->origin(index, extent);
}

int rows_of_last(const AxisRuns* runs, int extent) { return runs->rows_of_last(extent); }

/// Tiles of a whole axis, by the counts that the simulator and kernels share.
void count_axis(const gnaforge_problem* problem, int q_extent, int extent, TileCounts* out) {
  *out = count_axis_tiles(PatternAxis(*problem, 0), q_extent, extent);
}

/// Rows of last tiles that nobody sees.
double count_unseen(const gnaforge_problem* problem, int q_extent, int extent) {
  return count_spared(PatternAxis(*problem, 0), q_extent, extent, [=](int rows) { return extent - rows; });
}

/// And of a whole axis whose KV tiles visit Q tiles.
void count_axis_keys(const gnaforge_problem* problem, int k_extent, int extent, TileCounts* out) {
  *out = count_axis_key_tiles(PatternAxis(*problem, 0), k_extent, extent);
}

/// `check_every_range` of band_ranges.h.
void check_ranges(const gnaforge_problem* problem, const std::uint8_t* seen, int apart, Report* report) {
  check_every_range(*problem, seen, apart, *report);
}

/// All tiles, rows and columns of a group whose mask is [queries, keys], at most most_rows each. Where the grid's first
/// keys are stored apart, only runs know where rows are: those of a KV tile need not be neighbours.
void check_axis(const gnaforge_problem* problem, std::int64_t group, const std::uint8_t* data, int keys, int thorough,
                Report* report) {
  const Band band = AxisBands(PatternAxis(*problem, 0)).of(group);
  Mask mask;
  mask.keys = keys;
  for (int q = 0; q < band.queries; ++q) {
    Bits row = 0;
    for (int key = 0; key < keys; ++key) row |= Bits{data[q * keys + key] != 0} << key;
    mask.add_row(row);
  }
  const bool columns = problem->kv_sink[0] == 0;
  if (columns) check_columns(band, mask, *report);
  const int step = thorough ? 1 : 3;
  for (int i = 0; i < 6; i += step)
    for (int j = 0; j < 8; j += step) {
      for (int q = 0; q < mask.queries; q += q_extents[i])
        check_q_tile(band, mask, q, q_extents[i], extents[j], *report);
      for (int k = 0; k < keys; k += extents[j]) {
        if (columns) check_kv_tile(band, mask, k, extents[j], q_extents[i], *report);
        check_query_runs(band, mask, k, extents[j], q_extents[i], *report);
      }
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
    if (q_begin >= keys) continue;
    const QueryRuns queries = query_runs(band, q_begin, 128, keys, make_divisor(64));
    wrong += queries.count < 0 || queries.interior.end > queries.count;
  }
  return wrong;
}

}  // extern "C"
