// A call in the form that the kernel works on: tasks, addresses, scratch memory. Independent of the instruction set.
#pragma once

#include <cstdint>

#include "gnaforge/cpu/element.h"
#include "gnaforge/cpu/view.h"
#include "gnaforge/gna/band_tiles.h"
#include "gnaforge/pattern.h"
#include "gnaforge/names.h"

namespace gnaforge::cpu {

/// Which KV tiles the kernel visits; see gna/source.h.
template <class Config>
using TileSource = BandTiles<typename Config::QTile, typename Config::KvTile>;

/// Keys that one step of online softmax takes. Their scores fit the first-level cache beside a panel of Q.
constexpr int batch_keys = 64;

/// Rows are padded to this many, so that any vector width divides them.
constexpr int row_padding = 32;

/// One thread's scratch, in floats from its start. Every part is a multiple of 64 bytes.
struct Scratch {
  std::int64_t q;       ///< Q^T of the tile.
  std::int64_t out;     ///< O^T of the tile, not normalised.
  std::int64_t max;     ///< Running maximum per row, in log2.
  std::int64_t sum;     ///< Running sum per row.
  std::int64_t scores;  ///< S^T, then P^T, of a batch of keys.
  std::int64_t k;       ///< Keys of a batch, converted.
  std::int64_t v;       ///< Values of a batch, converted.
  std::int64_t floats;  ///< All of it.

  Scratch(int rows, int head_dim, int value_head_dim) {
    const std::int64_t padded = ceil_div(rows, row_padding) * row_padding;
    q = 0;
    out = q + head_dim * padded;
    max = out + value_head_dim * padded;
    sum = max + padded;
    scores = sum + padded;
    k = scores + (batch_keys + 16) * row_padding;
    v = k + batch_keys * head_dim;
    floats = v + batch_keys * value_head_dim;
    floats = (floats + 63) / 64 * 64;
  }
};

/// A call that can_run has accepted.
template <class Config>
struct Plan {
  using QTile = typename Config::QTile;
  using Element = typename ElementOf<Config::dtype>::type;
  static_assert(Config::out_dtype == Config::dtype, "the output has the inputs' dtype");
  static constexpr int rank = QTile::rank;

  AxisBands axis[rank];
  int head_dim;
  int value_head_dim;
  std::int64_t heads;
  std::int64_t heads_per_kv_head;
  float scale;  ///< Of Q K^T, for a softmax in powers of two.
  View<const Element, rank> q, k, v;
  View<Element, rank> out;
  View<float, rank> log_sum_exp;  ///< Its data is null where the caller wants none.
  ExtraPiece<Element> extra[GNAFORGE_MAX_EXTRA];
  AxisQTiles q_tiles[rank];
  std::int64_t tasks;
  Scratch scratch;

  explicit Plan(const gnaforge_args& args)
      : head_dim(static_cast<int>(args.problem->head_dim)),
        value_head_dim(static_cast<int>(args.problem->value_head_dim)),
        heads(args.problem->heads),
        heads_per_kv_head(heads == 0 ? 0 : heads / args.problem->kv_heads),
        scale(static_cast<float>(args.problem->scale * 1.4426950408889634)),
        q(*tensor_of(args, GNAFORGE_Q)),
        k(*tensor_of(args, GNAFORGE_K)),
        v(*tensor_of(args, GNAFORGE_V)),
        out(*tensor_of(args, GNAFORGE_OUT)),
        tasks(args.problem->batch * args.problem->heads),
        scratch(QTile::volume, head_dim, value_head_dim) {
    const gnaforge_tensor* const lse = tensor_of(args, GNAFORGE_LSE);
    if (lse != nullptr) log_sum_exp = View<float, rank>(*lse);
    for (int piece = 0; piece < GNAFORGE_MAX_EXTRA; ++piece)
      if (args.problem->extra_tokens[piece] > 0) extra[piece] = ExtraPiece<Element>(args, piece);
    for (int d = 0; d < rank; ++d) {
      axis[d] = AxisBands(PatternAxis(*args.problem, d));
      q_tiles[d] = AxisQTiles(query_axis(axis[d].axis), QTile::extents[d]);
      tasks *= q_tiles[d].count;
    }
  }

  /// About what a task takes, to compare those of several calls.
  double task_work() const {
    double keys = 1;
    for (int d = 0; d < rank; ++d) {
      const PatternAxis& of = axis[d].axis;
      const std::int64_t seen = of.window + of.sink + QTile::extents[d], there = of.kv_tokens / of.dilation + 1;
      keys *= static_cast<double>(seen < there ? seen : there);
    }
    for (const ExtraPiece<Element>& piece : extra) keys += static_cast<double>(piece.tokens);
    return keys * (head_dim + value_head_dim);
  }
};

/// One Q tile of one head, with the dilation group that it lies in.
template <class Config>
struct Task {
  static constexpr int rank = Config::QTile::rank;

  std::int64_t batch, head, kv_head;
  std::int64_t q_first[rank], k_first[rank];  ///< The group's first token in the query and in the key tensor.
  int q_begin[rank];                          ///< The tile's first query, as a row of the group.
  Band band[rank];

  /// Query heads that share keys come next to each other, then neighbouring tiles: consecutive tasks share K and V.
  Task(const Plan<Config>& plan, std::int64_t index) {
    const std::int64_t member = index % plan.heads_per_kv_head;
    index /= plan.heads_per_kv_head;
    for (int d = rank - 1; d >= 0; --d) {
      int row, tile;
      plan.q_tiles[d].locate(index % plan.q_tiles[d].count, row, tile);
      index /= plan.q_tiles[d].count;
      q_begin[d] = tile * Config::QTile::extents[d];
      const AxisBands& axis = plan.axis[d];
      const std::int64_t group = axis.whole ? row : axis.axis.group_of(row);
      q_first[d] = row;
      k_first[d] = axis.whole ? row : axis.axis.first_key(group);
      band[d] = axis.of(group);
    }
    const std::int64_t kv_heads = plan.heads / plan.heads_per_kv_head;
    kv_head = index % kv_heads;
    head = kv_head * plan.heads_per_kv_head + member;
    batch = index / kv_heads;
  }

  /// Element that the query in row `row` of this batch entry and head begins at.
  template <class T>
  T* at_query(const View<T, rank>& view, const Plan<Config>& plan, const int (&row)[rank]) const {
    return at(view, head, plan, q_first, row);
  }

  /// And the key in a row where it is stored.
  template <class T>
  T* at_key(const View<T, rank>& view, const Plan<Config>& plan, const int (&row)[rank]) const {
    return at(view, kv_head, plan, k_first, row);
  }

 private:
  template <class T>
  T* at(const View<T, rank>& view, std::int64_t of_head, const Plan<Config>& plan, const std::int64_t (&first)[rank],
        const int (&row)[rank]) const {
    std::int64_t offset = batch * view.batch_stride + of_head * view.head_stride;
    for (int d = 0; d < rank; ++d) offset += (first[d] + row[d] * plan.axis[d].axis.dilation) * view.token_stride[d];
    return view.data + offset;
  }
};

}  // namespace gnaforge::cpu
