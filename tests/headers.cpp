// C functions over the window, tile and mask headers, for test_headers.py. With nvcc: that they compile for a device.
#include "gnaforge/cpu/row_set.h"
#include "gnaforge/pattern.h"
#include "gnaforge/gna/source.h"
#include "gnaforge/sm90/forward/quad_columns.h"

#include <climits>
#include <vector>

using namespace gnaforge;

namespace {

/// gnaforge::Axis as test_headers.py fills it.
struct PlainAxis {
  int length, window, stride, dilation;
  bool causal;

  operator Axis() const { return {length, window, make_divisor(stride), dilation, causal}; }
};

template <class Tile>
using Coordinates = int[Tile::rank];

/// Splits a row-major index into coordinates.
template <class Tile>
void split(int index, const Coordinates<Tile>& shape, Coordinates<Tile>& coordinates) {
  for (int d = Tile::rank - 1; d >= 0; --d) {
    coordinates[d] = index % shape[d];
    index /= shape[d];
  }
}

template <class Tile>
bool has_row(const cpu::RowSet<Tile>& set, int row) {
  return (set.word[row / 64] >> (row % 64) & 1) != 0;
}

/// Masks of sm90's kernels, with their table as thread blocks make it.
template <class KvTile>
struct QuadMasks {
  using Columns = sm90::QuadColumns<KvTile>;
  static constexpr int rank = KvTile::rank;
  std::vector<unsigned> table;

  QuadMasks() {
    for (int d = 0; rank > 1 && d < rank; ++d)
      for (int end = 0; end < Columns::coordinates(d); ++end)
        for (int quad = 0; quad < 4; ++quad)
          for (int word = 0; word < Columns::words; ++word) table.push_back(Columns::below(d, end, quad, word));
  }

  unsigned below(int d, int end, int quad, int word) const {
    const int at = Columns::table_offset(d) + Columns::clip(d, end) * Columns::entry_bytes;
    return table[static_cast<unsigned>(at / 4 + quad * Columns::words + word)];
  }

  bool has(const Interval (&seen)[rank], int column) const {
    const int quad = column % 8 / 2, word = column / 128;
    unsigned bits = ~0u;
    for (int d = 0; d < rank; ++d)
      if constexpr (rank == 1)
        bits = range_bits(Columns::count_below(seen[0].begin, quad) - 32 * word,
                          Columns::count_below(seen[0].end, quad) - 32 * word);
      else
        bits &= below(d, seen[d].end, quad, word) & ~below(d, seen[d].begin, quad, word);
    return (bits >> (column % 128 / 8 * 2 + column % 2) & 1) != 0;
  }
};

/// An axis without a setting beyond its own, as a pattern.
PatternAxis plain(const Axis& axis) {
  PatternAxis pattern{};
  pattern.length = pattern.q_tokens = pattern.kv_tokens = axis.length;
  pattern.window = axis.window;
  pattern.stride = axis.stride.value;
  pattern.dilation = axis.dilation;
  pattern.causal = axis.causal;
  return pattern;
}

/// What a kernel would do with one dilation group per axis. The arrays [queries, keys] say of each pair how often it
/// was visited, how often RowMask, RowSet and QuadMasks call it visible, and which tile of its Q tile's list it is in.
/// The arrays [Q tiles] hold the lengths of the lists; `origin` gets the first keys of all their tiles, [tiles, rank].
/// Returns how often a mask shows a pair that does not exist, or a tile's extent leaves out a key that is visible.
struct Visits {
  int* visits;
  int* row_mask;
  int* row_set;
  int* quad_mask;
  int* tile;
  int* count;
  int* interior;
  int* origin;
};

template <class QTile, class KvTile>
int visit(const PlainAxis* groups, const Visits& out) {
  using Source = WindowTiles<QTile, KvTile>;
  constexpr int rank = QTile::rank;
  Axis axis[rank];
  Band band[rank];
  Coordinates<QTile> q_tiles, q_extents, kv_extents;
  int q_tile_count = 1, tokens = 1, widest = 0;
  for (int d = 0; d < rank; ++d) {
    axis[d] = groups[d];
    band[d] = band_of(plain(axis[d]), 0);
    q_extents[d] = QTile::extent(d);
    kv_extents[d] = KvTile::extent(d);
    q_tiles[d] = ceil_div(axis[d].length, q_extents[d]);
    q_tile_count *= q_tiles[d];
    tokens *= axis[d].length;
    widest = max_int(widest, kv_extents[d]);
  }
  cpu::RowSet<QTile>* rows[rank];
  for (cpu::RowSet<QTile>*& sets : rows) sets = new cpu::RowSet<QTile>[static_cast<unsigned>(widest)];
  const QuadMasks<KvTile> quad_masks;
  int stray = 0;
  int* origins = out.origin;
  for (int q_tile = 0; q_tile < q_tile_count; ++q_tile) {
    Coordinates<QTile> q_begin;
    split<QTile>(q_tile, q_tiles, q_begin);
    for (int d = 0; d < rank; ++d) q_begin[d] *= q_extents[d];
    const typename Source::List list = Source::list(axis, q_begin);
    const cpu::TileRows<BandTiles<QTile, KvTile>> tile_rows(band, q_begin);
    typename Source::Walk walk;
    walk.begin(list);
    out.count[q_tile] = list.count;
    out.interior[q_tile] = list.interior;
    for (int index = 0; index < list.count; ++index) {
      if (index > 0) walk.step(list, index);
      Coordinates<KvTile> origin, used;
      for (int d = 0; d < rank; ++d) {
        origin[d] = Source::origin(list, walk, d);
        used[d] = Source::rows(list, walk, d).end - origin[d];
        *origins++ = origin[d];
        tile_rows.rows_that_see(d, origin[d], kv_extents[d], rows[d]);
      }
      for (int row = 0; row < QTile::volume; ++row) {
        Coordinates<QTile> query;
        split<QTile>(row, q_extents, query);
        bool exists = true;
        int query_index = 0;
        for (int d = 0; d < rank; ++d) {
          query[d] += q_begin[d];
          exists = exists && query[d] < axis[d].length;
          query_index = query_index * axis[d].length + query[d];
        }
        Interval seen[rank];
        for (int d = 0; d < rank; ++d) seen[d] = Source::seen(axis[d], Source::row(axis[d], query[d]), origin[d]);
        unsigned mask[RowMask<KvTile>::words];
        RowMask<KvTile>::find(seen, mask);
        for (int column = 0; column < 32 * ceil_div(KvTile::volume, 32); ++column) {
          const bool in_mask = (mask[column / 32] >> (column % 32) & 1) != 0;
          if (column >= KvTile::volume) {
            stray += in_mask;
            continue;
          }
          const bool in_quad_mask = quad_masks.has(seen, column);
          Coordinates<KvTile> key;
          split<KvTile>(column, kv_extents, key);
          bool in_set = true, in_use = true, key_exists = true;
          int key_index = 0;
          for (int d = 0; d < rank; ++d) {
            in_set = in_set && has_row(rows[d][key[d]], row);
            in_use = in_use && key[d] < used[d];
            key[d] += origin[d];
            key_exists = key_exists && key[d] < axis[d].length;
            key_index = key_index * axis[d].length + key[d];
          }
          if (!exists) {
            stray += in_set;  // the mask row of a query that does not exist means nothing
          } else if (!key_exists) {
            stray += in_set + in_mask + in_quad_mask;
          } else {
            stray += in_mask && !in_use;
            stray += !in_mask && Source::kind(list, index) == TileKind::interior;
            const int pair = query_index * tokens + key_index;
            out.visits[pair] += 1;
            out.row_mask[pair] += in_mask;
            out.row_set[pair] += in_set;
            out.quad_mask[pair] += in_quad_mask;
            out.tile[pair] = index;
          }
        }
      }
    }
  }
  for (cpu::RowSet<QTile>* sets : rows) delete[] sets;
  return stray;
}

template <class QTile, class KvTile>
TileCounts count(const PlainAxis* axes) {
  Axis axis[QTile::rank];
  for (int d = 0; d < QTile::rank; ++d) axis[d] = axes[d];
  return count_tiles<QTile, KvTile>(axis);
}

/// Q tiles of all dilation groups, in closed form. Numbered, each has its place in its own group.
template <class QTile>
std::int64_t q_tiles(const PlainAxis* axes, int* errors) {
  std::int64_t total = 1;
  *errors = 0;
  for (int d = 0; d < QTile::rank; ++d) {
    const Axis axis = axes[d];
    const AxisQTiles tiles(axis, QTile::extent(d));
    std::int64_t index = 0;
    for (int of = 0; of < axis.dilation; ++of)
      for (int at = 0; at * QTile::extent(d) < group_length(axis, of); ++at) {
        int group = -1, tile = -1;
        tiles.locate(index++, group, tile);
        *errors += group != of || tile != at;
      }
    *errors += index != tiles.count;
    total *= tiles.count;
  }
  return total;
}

struct Shape {
  int rank;
  const int* q_tile;
  const int* kv_tile;
  int (*visit)(const PlainAxis*, const Visits&);
  TileCounts (*count)(const PlainAxis*);
  std::int64_t (*q_tiles)(const PlainAxis*, int*);
};

template <class QTile, class KvTile>
constexpr Shape shape() {
  return {QTile::rank, QTile::extents, KvTile::extents, visit<QTile, KvTile>, count<QTile, KvTile>, q_tiles<QTile>};
}

const Shape shapes[] = {
    shape<Box<1>, Box<1>>(),
    shape<Box<4>, Box<3>>(),
    shape<Box<7>, Box<33>>(),
    shape<Box<64>, Box<64>>(),
    shape<Box<64>, Box<256>>(),
    shape<Box<1, 1>, Box<1, 1>>(),
    shape<Box<4, 4>, Box<2, 8>>(),
    shape<Box<3, 5>, Box<5, 7>>(),
    shape<Box<8, 8>, Box<16, 16>>(),
    shape<Box<1, 64>, Box<1, 40>>(),
    shape<Box<1, 1, 1>, Box<1, 1, 1>>(),
    shape<Box<2, 2, 2>, Box<2, 1, 2>>(),
    shape<Box<3, 5, 4>, Box<3, 5, 4>>(),
    shape<Box<4, 1, 3>, Box<1, 4, 33>>(),
    shape<Box<4, 4, 8>, Box<4, 4, 8>>(),
};

}  // namespace

extern "C" {

int shape_count() { return static_cast<int>(sizeof(shapes) / sizeof(shapes[0])); }
const Shape* shape_at(int index) { return &shapes[index]; }
int visit_tiles(int index, const PlainAxis* groups, const Visits* out) { return shapes[index].visit(groups, *out); }
void count_all_tiles(int index, const PlainAxis* axes, TileCounts* out) { *out = shapes[index].count(axes); }
std::int64_t count_q_tiles(int index, const PlainAxis* axes, int* errors) {
  return shapes[index].q_tiles(axes, errors);
}

/// Fills one entry per position of a dilation group; returns the length of the group.
int all_windows(const PlainAxis* axis, int group, Interval* windows, Interval* transposed) {
  const Axis positions = group_axis(*axis, group);
  for (int i = 0; i < positions.length; ++i) {
    windows[i] = window(positions, i);
    transposed[i] = transposed_window(positions, i);
  }
  return positions.length;
}

/// How often a Divisor and the language differ: divisors from `first` to `last`, dividends from 0 to `dense`, and from
/// there to the largest those beside the multiples that are `spread` apart, down from the last one.
std::int64_t count_wrong_divisions(int first, int last, int dense, int spread) {
  std::int64_t wrong = 0;
  const auto check = [&](const Divisor& by, std::int64_t dividend) {
    if (dividend < 0 || dividend > INT_MAX) return;
    const int number = static_cast<int>(dividend);
    int quotient = number;
    const int rest = by.split(quotient);
    wrong += by.quotient(number) != number / by.value || quotient != number / by.value || rest != number % by.value ||
             by.floor(number) != number - number % by.value;
    if (number <= INT_MAX - by.value) wrong += by.quotient_up(number) != ceil_div(number, by.value);
  };
  for (std::int64_t value = first; value <= last; ++value) {
    const Divisor by = make_divisor(static_cast<int>(value));
    wrong += by.value != value;
    for (std::int64_t dividend = 0; dividend <= dense; ++dividend) check(by, dividend);
    for (std::int64_t quotient = INT_MAX / value; quotient >= 0; quotient -= spread)
      for (int beside = -1; beside <= 1; ++beside) check(by, quotient * value + beside);
    check(by, INT_MAX);
  }
  return wrong;
}

}  // extern "C"

#if defined(__CUDACC__)
/// Reaches every function of the headers with arguments that the compiler cannot know.
__global__ void on_device(Axis x, Axis y, Axis z, Band b, int first_query, unsigned* out) {
  using QTile = Box<2, 4, 8>;
  using KvTile = Box<2, 8, 8>;
  const Axis axis[] = {group_axis(x, first_query), y, z};
  const int query[] = {first_query, 0, 0};
  using Source = WindowTiles<QTile, KvTile>;
  const Source::List list = Source::list(axis, query);
  Source::Walk walk;
  walk.begin(list);
  for (int index = 0; index < list.count; ++index) {
    if (index > 0) walk.step(list, index);
    Interval seen[3];
    for (int d = 0; d < 3; ++d)
      seen[d] = Source::seen(axis[d], Source::row(axis[d], query[d]), Source::origin(list, walk, d));
    unsigned mask[RowMask<KvTile>::words];
    RowMask<KvTile>::find(seen, mask);
    *out++ = static_cast<unsigned>(Source::kind(list, index)) + static_cast<unsigned>(Source::rows(list, walk, 0).end);
    for (const unsigned word : mask) *out++ = word;
  }
  using Columns = sm90::QuadColumns<KvTile>;
  const int quad = first_query % 4;
  *out++ = Columns::below(0, Columns::clip(0, first_query), quad, 0) + Columns::below(2, first_query, quad, 0);
  *out++ = static_cast<unsigned>(Columns::count_below(first_query, quad) + Columns::table_offset(2));
  *out++ = static_cast<unsigned>(transposed_window(axis[0], first_query).end + QTile::pitch(first_query));
  *out++ = static_cast<unsigned>(QTile::divisor(first_query % 3).quotient(first_query));
  *out++ = static_cast<unsigned>(count_tiles<QTile, KvTile>(axis).visited);
  using Bands = BandTiles<QTile, KvTile>;
  const Band band[] = {b, b, b};
  const Bands::List runs = Bands::list(band, query);
  Bands::Walk place;
  place.begin(runs);
  const Interval rows = Bands::rows(runs, place, 0);
  const Interval keys = Bands::seen(b, Bands::row(b, first_query), Bands::origin(runs, place, 1));
  *out++ = static_cast<unsigned>(rows.begin + keys.end + stored_row(b, rows.end, keys.begin));
  *out++ = static_cast<unsigned>(axis_queries(b, first_query, 8, rows.end, 4).count);
  int group, tile;
  const AxisQTiles tiles(x, QTile::extent(0));
  tiles.locate(first_query, group, tile);
  *out++ = static_cast<unsigned>(tiles.count + group + tile);
}
#endif
