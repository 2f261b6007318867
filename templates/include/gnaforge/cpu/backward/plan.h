// A backward call in the form that the kernel works on: tasks, addresses, scratch memory. Independent of the
// instruction set. Two ops share it. backward_q has a task per Q tile, whose queries are lanes and whose keys come as
// rows; backward_kv a task per KV tile, whose keys are lanes and whose queries come as rows, of all heads that share
// the keys.
#pragma once

#include <type_traits>

#include "gnaforge/cpu/forward/plan.h"

namespace gnaforge::cpu {

/// One thread's scratch, in floats from its start. Every part is a multiple of 64 bytes. The first tensor of a pair has
/// head_dim channels (Q or K), the second value_head_dim (dO or V).
struct GradientScratch {
  std::int64_t lanes[2];  ///< The tile's tokens, transposed.
  std::int64_t sums[2];   ///< Gradients of the tile, transposed.
  std::int64_t lse;       ///< Per lane, in log2, where queries are lanes.
  std::int64_t delta;     ///< Likewise.
  std::int64_t scores;    ///< S^T, then P^T, of a batch of rows.
  std::int64_t slopes;    ///< dP^T, then dS^T.
  std::int64_t rows[2];   ///< The batch, converted.
  std::int64_t floats;    ///< All of it.

  GradientScratch(int volume, int head_dim, int value_head_dim) : floats(0) {
    const std::int64_t padded = ceil_div(volume, row_padding) * row_padding;
    const int channels[] = {head_dim, value_head_dim};
    for (int i = 0; i < 2; ++i) {
      lanes[i] = take(channels[i] * padded);
      sums[i] = take(channels[i] * padded);
      rows[i] = take(batch_keys * channels[i]);
    }
    lse = take(padded);
    delta = take(padded);
    scores = take((batch_keys + 16) * row_padding);
    slopes = take((batch_keys + 16) * row_padding);
  }

 private:
  std::int64_t take(std::int64_t count) {
    const std::int64_t at = floats;
    floats += (count + 15) / 16 * 16;
    return at;
  }
};

/// A call that can_run has accepted.
template <class Config>
struct GradientPlan {
  static constexpr bool of_keys = Config::op == GNAFORGE_GNA_BACKWARD_KV;
  using Tile = std::conditional_t<of_keys, typename Config::KvTile, typename Config::QTile>;
  using Element = typename ElementOf<Config::dtype>::type;
  static_assert(Config::out_dtype == Config::dtype, "gradients have the inputs' dtype");
  static constexpr int rank = Tile::rank;

  AxisBands axis[rank];
  int head_dim;
  int value_head_dim;
  std::int64_t batch, heads, heads_per_kv_head;
  std::int64_t tokens[rank];  ///< Of the queries.
  float scale;                ///< Of Q K^T.
  View<const Element, rank> q, k, v, out, grad_out;
  View<const float, rank> log_sum_exp;
  View<const float, rank> grad_log_sum_exp;  ///< Its data is null where it is zero.
  View<float, rank> delta;                   ///< Its data is null until `run` knows where.
  bool delta_is_given;
  View<Element, rank> grad[2];  ///< Of the first and of the second tensor; the second of backward_kv only.
  bool accumulates[2];          ///< Whether gradients are added to what is there.
  ExtraPiece<Element> extra[GNAFORGE_MAX_EXTRA];
  View<Element, 1> extra_grad[GNAFORGE_MAX_EXTRA][2];  ///< Of backward_kv, as `grad`.
  bool extra_accumulates[GNAFORGE_MAX_EXTRA][2];
  AxisQTiles tiles[rank];
  std::int64_t extra_tasks[GNAFORGE_MAX_EXTRA];  ///< Tiles of extra keys, of all heads; of backward_kv.
  std::int64_t tasks;                            ///< All of them. The extra keys', which take longest, are the first.
  GradientScratch scratch;

  explicit GradientPlan(const gnaforge_args& args)
      : head_dim(static_cast<int>(args.problem->head_dim)),
        value_head_dim(static_cast<int>(args.problem->value_head_dim)),
        batch(args.problem->batch),
        heads(args.problem->heads),
        heads_per_kv_head(heads == 0 ? 0 : heads / args.problem->kv_heads),
        scale(static_cast<float>(args.problem->scale)),
        q(*tensor_of(args, GNAFORGE_Q)),
        k(*tensor_of(args, GNAFORGE_K)),
        v(*tensor_of(args, GNAFORGE_V)),
        grad_out(*tensor_of(args, GNAFORGE_GRAD_OUT)),
        log_sum_exp(*tensor_of(args, GNAFORGE_LSE)),
        delta_is_given(args.features & GNAFORGE_FEATURE_DELTA),
        tasks(batch * (of_keys ? args.problem->kv_heads : heads)),
        scratch(Tile::volume, head_dim, value_head_dim) {
    if (const gnaforge_tensor* const given = tensor_of(args, GNAFORGE_OUT)) out = View<const Element, rank>(*given);
    if (const gnaforge_tensor* const given = tensor_of(args, GNAFORGE_GRAD_LSE))
      grad_log_sum_exp = View<const float, rank>(*given);
    if (const gnaforge_tensor* const given = tensor_of(args, GNAFORGE_DELTA)) delta = View<float, rank>(*given);
    constexpr gnaforge_role roles[] = {of_keys ? GNAFORGE_GRAD_K : GNAFORGE_GRAD_Q, GNAFORGE_GRAD_V};
    for (int i = 0; i < (of_keys ? 2 : 1); ++i) {
      grad[i] = View<Element, rank>(*tensor_of(args, roles[i]));
      accumulates[i] = args.accumulate & bit(roles[i]);
    }
    for (int d = 0; d < rank; ++d) {
      axis[d] = AxisBands(PatternAxis(*args.problem, d));
      tokens[d] = args.problem->tokens[d];
      tiles[d] = AxisQTiles(of_keys ? key_axis(axis[d].axis) : query_axis(axis[d].axis), Tile::extents[d]);
      tasks *= tiles[d].count;
    }
    for (int piece = 0; piece < GNAFORGE_MAX_EXTRA; ++piece) {
      extra_tasks[piece] = 0;
      if (args.problem->extra_tokens[piece] == 0) continue;
      extra[piece] = ExtraPiece<Element>(args, piece);
      if (of_keys) add_extra_tasks(args, piece);
    }
  }

  /// Queries of all heads: how many numbers `delta` has.
  std::int64_t queries() const {
    std::int64_t count = batch * heads;
    for (int d = 0; d < rank; ++d) count *= tokens[d];
    return count;
  }

  /// Puts `delta` into memory of the call's own.
  void place_delta(float* memory) {
    delta.data = memory;
    delta.head_stride = 1;
    std::int64_t stride = heads;
    for (int d = rank; d-- > 0; stride *= tokens[d]) delta.token_stride[d] = stride;
    delta.batch_stride = stride;
  }

 private:
  void add_extra_tasks(const gnaforge_args& args, int piece) {
    extra_tasks[piece] = batch * args.problem->kv_heads * ((extra[piece].tokens + Tile::volume - 1) / Tile::volume);
    tasks += extra_tasks[piece];
    const int roles[] = {GNAFORGE_GRAD_EXTRA_K + piece, GNAFORGE_GRAD_EXTRA_V + piece};
    for (int i = 0; i < 2; ++i) {
      extra_grad[piece][i] = View<Element, 1>(*tensor_of(args, roles[i]));
      extra_accumulates[piece][i] = args.accumulate & bit(roles[i]);
    }
  }
};

/// One tile of one head, with the dilation group that it lies in; or one of extra keys, which all queries see.
template <class Config>
struct GradientTask {
  using Plan = GradientPlan<Config>;
  static constexpr int rank = Plan::rank;

  std::int64_t batch, head, kv_head;          ///< The first query head of backward_kv.
  int piece;                                  ///< Of the extra keys; -1: a tile of the grid.
  std::int64_t q_first[rank], k_first[rank];  ///< The group's first token in the query and in the key tensor.
  std::int64_t step[rank];                    ///< Between its tokens.
  int begin[rank];                            ///< The tile's first token, as a row of the group.
  int end[rank];                              ///< Rows of the tile's side that the group has.
  Band band[rank];

  /// Query heads that share keys come next to each other, then neighbouring tiles: consecutive tasks share tensors.
  GradientTask(const Plan& plan, std::int64_t index) : piece(-1) {
    for (int i = 0; i < GNAFORGE_MAX_EXTRA; ++i) {
      if (index < plan.extra_tasks[i]) {
        place_extra(plan, i, index);
        return;
      }
      index -= plan.extra_tasks[i];
    }
    const std::int64_t per_tile = Plan::of_keys ? 1 : plan.heads_per_kv_head;
    const std::int64_t member = index % per_tile;
    index /= per_tile;
    for (int d = rank - 1; d >= 0; --d) {
      int row, tile;
      plan.tiles[d].locate(index % plan.tiles[d].count, row, tile);
      index /= plan.tiles[d].count;
      begin[d] = tile * Plan::Tile::extents[d];
      const PatternAxis& axis = plan.axis[d].axis;
      step[d] = axis.dilation;
      const std::int64_t group = Plan::of_keys ? axis.group_of_key(row) : axis.group_of(row);
      band[d] = plan.axis[d].of(group);
      q_first[d] = axis.first_query(group);
      k_first[d] = axis.first_key(group);
      end[d] = Plan::of_keys ? static_cast<int>((axis.kv_tokens - row + axis.dilation - 1) / axis.dilation)
                             : band[d].queries;
    }
    const std::int64_t kv_heads = plan.heads / plan.heads_per_kv_head;
    kv_head = index % kv_heads;
    head = kv_head * plan.heads_per_kv_head + member;
    batch = index / kv_heads;
  }

  /// Element that a query of the head `of_head` begins at.
  template <class T>
  T* at_query(const View<T, rank>& view, std::int64_t of_head, const int (&row)[rank]) const {
    return at(view, of_head, q_first, row);
  }

  /// And a key, in the row where it is stored.
  template <class T>
  T* at_key(const View<T, rank>& view, const int (&row)[rank]) const {
    return at(view, kv_head, k_first, row);
  }

  /// And a token of the piece.
  template <class T>
  T* at_extra(const View<T, 1>& view, std::int64_t token) const {
    return view.data + batch * view.batch_stride + token * view.token_stride[0] + kv_head * view.head_stride;
  }

 private:
  void place_extra(const Plan& plan, int of_piece, std::int64_t index) {
    piece = of_piece;
    const std::int64_t tokens = plan.extra[piece].tokens,
                       tiles = (tokens + Plan::Tile::volume - 1) / Plan::Tile::volume;
    for (int d = 0; d < rank; ++d) {
      q_first[d] = k_first[d] = 0;
      step[d] = 1;
      begin[d] = 0;
      end[d] = 1;
    }
    begin[0] = static_cast<int>(index % tiles) * Plan::Tile::volume;
    end[0] = static_cast<int>(tokens);
    index /= tiles;
    const std::int64_t kv_heads = plan.heads / plan.heads_per_kv_head;
    kv_head = index % kv_heads;
    head = kv_head * plan.heads_per_kv_head;
    batch = index / kv_heads;
  }

  template <class T>
  T* at(const View<T, rank>& view, std::int64_t of_head, const std::int64_t (&first)[rank],
        const int (&row)[rank]) const {
    std::int64_t offset = batch * view.batch_stride + of_head * view.head_stride;
    for (int d = 0; d < rank; ++d) offset += (first[d] + row[d] * step[d]) * view.token_stride[d];
    return view.data + offset;
  }
};

}  // namespace gnaforge::cpu
