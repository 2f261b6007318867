// The backward pass of one tile, with its tokens in lanes: queries of backward_q, keys of backward_kv. The others come
// as rows. For a query i and a key j that it sees, with scale c (FlashAttention-2, arXiv 2307.08691, section 3.1.2):
//   S = c Q K^T    P = exp(S - LSE)    dP = dO V^T    dS = P (dP - delta)
//   dQ = c dS K    dK = c dS^T Q       dV = P^T dO    delta = sum over channels of dO O, less dLSE
// No include guard, see vector.h.

namespace gnaforge::cpu::GNAFORGE_ISA {

template <class Config>
class Backward {
  using Plan = GradientPlan<Config>;
  using Task = GradientTask<Config>;
  using Tile = typename Plan::Tile;
  using Element = typename Plan::Element;
  static constexpr bool of_keys = Plan::of_keys;
  static constexpr int rank = Tile::rank, extent = RowTable<Tile>::max_extent(), pair = of_keys ? 2 : 1;
  static constexpr int width = panel_width<Tile::volume>();
  static constexpr int panel = width * lanes;
  static constexpr int panels = (Tile::volume + panel - 1) / panel;
  static constexpr std::uint32_t panel_bits = ~0u >> (32 - panel);
  static constexpr float log2e = 1.442695041f;
  using Part = RowPart<extent>;

 public:
  /// Works on tasks until `next` runs past the last.
  static void run(const Plan& plan, float* scratch, std::atomic<std::int64_t>& next) {
    for (std::int64_t index = next++; index < plan.tasks; index = next++) {
      Backward tile(plan, Task(plan, index), scratch);
      // NaN is either the answer, or 0 times a value that isn't finite, of a token that has nothing to do with a lane.
      if (!tile.attend(false)) tile.attend(true);
    }
  }

  /// Computes delta of the queries [begin, end), which are numbered with heads innermost.
  static void compute_delta(const Plan& plan, std::int64_t begin, std::int64_t end) {
    for (std::int64_t index = begin; index < end; ++index) {
      std::int64_t rest = index / plan.heads;
      const std::int64_t head = index % plan.heads;
      std::int64_t token[rank];
      for (int d = rank - 1; d >= 0; --d) {
        token[d] = rest % plan.tokens[d];
        rest /= plan.tokens[d];
      }
      const auto at = [&](const auto& view) {
        std::int64_t offset = rest * view.batch_stride + head * view.head_stride;
        for (int d = 0; d < rank; ++d) offset += token[d] * view.token_stride[d];
        return view.data + offset;
      };
      alignas(64) float out[max_head_dim], grad[max_head_dim];
      widen(out, at(plan.out), plan.value_head_dim);
      widen(grad, at(plan.grad_out), plan.value_head_dim);
      float sum = 0;
      for (int c = 0; c < plan.value_head_dim; ++c) sum += out[c] * grad[c];
      if (plan.grad_log_sum_exp.data != nullptr) sum -= *at(plan.grad_log_sum_exp);
      *at(plan.delta) = sum;
    }
  }

 private:
  Backward(const Plan& plan, const Task& task, float* scratch) : plan_(plan), task_(task), scratch_(scratch) {
    for (int d = 0; d < rank; ++d)
      if (task_.piece >= 0)
        related_[d] = AxisRows<extent>::all_queries(static_cast<int>(plan_.tokens[d]));
      else if constexpr (of_keys)
        related_[d] = AxisRows<extent>::queries_of(task_.band[d], task_.begin[d], task_.end[d]);
      else
        related_[d] = AxisRows<extent>::keys_of(task_.band[d], task_.begin[d]);
  }

  int channels(int i) const { return i == 0 ? plan_.head_dim : plan_.value_head_dim; }

  float* panel_of(const std::int64_t (&part)[2], int i, int p) const {
    return scratch_ + part[i] + p * channels(i) * panel;
  }

  /// Computes and stores the tile; false if it has a NaN, and is not stored. Where `careful` it is, and values that are
  /// not finite reach only the lanes that have to do with them.
  bool attend(bool careful) {
    careful_ = careful;
    load_lanes();
    gathered_ = 0;
    if constexpr (!of_keys) gather_extra();
    for (head_ = task_.head; head_ < task_.head + (of_keys ? plan_.heads_per_kv_head : 1); ++head_) {
      gather_parts<false>();
      flush<false>();
      gather_parts<true>();
      flush<true>();
    }
    for (int i = 0; i < pair; ++i)
      if (!careful && holds_nan(i)) return false;
    for (int i = 0; i < pair; ++i) store_sums(i);
    return true;
  }

  /// Position of a lane's token; false if it has none.
  bool locate(int lane, int (&position)[rank]) const {
    bool exists = lane < Tile::volume;
    if (task_.piece >= 0) {  // tokens in a line
      for (int d = 0; d < rank; ++d) position[d] = 0;
      position[0] = task_.begin[0] + lane;
      return exists && position[0] < task_.end[0];
    }
    for (int d = 0; d < rank; ++d) {
      position[d] = task_.begin[d] + lane / Tile::pitch(d) % Tile::extents[d];
      exists = exists && position[d] < task_.end[d];
    }
    return exists;
  }

  /// Whether a token that exists counts: extra keys beyond their length are not looked at.
  bool counts(const int (&position)[rank]) const {
    return task_.piece < 0 || position[0] < plan_.extra[task_.piece].count(task_.batch);
  }

  const Element* at_lane(int i, const int (&position)[rank]) const {
    if (task_.piece >= 0) {
      const ExtraPiece<Element>& piece = plan_.extra[task_.piece];
      return task_.at_extra(i == 0 ? piece.k : piece.v, position[0]);
    }
    if constexpr (of_keys) return task_.at_key(i == 0 ? plan_.k : plan_.v, position);
    return task_.at_query(i == 0 ? plan_.q : plan_.grad_out, task_.head, position);
  }

  /// The tile's tokens, transposed, of which Q or K are scaled; and empty gradients. Lanes without a token are 0.
  void load_lanes() {
    for (int i = 0; i < 2; ++i)
      for (int p = 0; p < panels; ++p) {
        float* const to = panel_of(plan_.scratch.lanes, i, p);
        for (int lane = 0; lane < panel; lane += 4) {
          alignas(64) float row[4][max_head_dim];
          for (int r = 0; r < 4; ++r) {
            int position[rank];
            if (locate(p * panel + lane + r, position) && counts(position))
              widen(row[r], at_lane(i, position), channels(i));
            else
              std::memset(row[r], 0, sizeof(float) * channels(i));
          }
          for (int c = 0; c < channels(i); c += 4) {
            Quad quad[4];
            for (int r = 0; r < 4; ++r) {
              quad[r] = *reinterpret_cast<const UnalignedQuad*>(row[r] + c);
              if (i == 0) quad[r] *= plan_.scale * log2e;
            }
            transpose(quad);
            for (int r = 0; r < 4; ++r) *reinterpret_cast<UnalignedQuad*>(to + (c + r) * panel + lane) = quad[r];
          }
        }
      }
    for (int i = 0; i < pair; ++i)
      std::memset(scratch_ + plan_.scratch.sums[i], 0, sizeof(float) * channels(i) * panels * panel);
    if constexpr (of_keys) return;
    for (int lane = 0; lane < panels * panel; ++lane) {
      int position[rank];
      const bool exists = locate(lane, position);
      scratch_[plan_.scratch.lse + lane] =
          exists ? *task_.at_query(plan_.log_sum_exp, task_.head, position) * log2e : __builtin_inff();
      scratch_[plan_.scratch.delta + lane] = exists ? *task_.at_query(plan_.delta, task_.head, position) : 0.0f;
    }
  }

  /// Gathers the rows that all lanes have to do with; where Masked those that only some have.
  template <bool Masked>
  void gather_parts() {
    int chosen[rank] = {};
    for (int d = 0; d < rank; ++d)
      if (related_[d].count == 0) return;
    for (;;) {
      gather<Masked>(chosen);
      int d = rank - 1;
      while (d >= 0 && ++chosen[d] == related_[d].count) chosen[d--] = 0;
      if (d < 0) return;
    }
  }

  /// Of one part per axis.
  template <bool Masked>
  void gather(const int (&chosen)[rank]) {
    constexpr int inner = rank - 1;
    const Part* part[rank];
    int row[rank];
    for (int d = 0; d < rank; ++d) {
      part[d] = &related_[d].part[chosen[d]];
      if (!Masked && part[d]->all.begin >= part[d]->all.end) return;
      row[d] = Masked ? part[d]->any.begin : part[d]->all.begin;
    }
    for (;;) {
      bool whole = true;
      RowSet<Tile> lanes_of_line;
      for (auto& word : lanes_of_line.word) word = ~0ull;
      for (int d = 0; d < inner; ++d) {
        whole = whole && row[d] >= part[d]->all.begin && row[d] < part[d]->all.end;
        if (!Masked) continue;
        const RowSet<Tile> along = lanes_of<Tile>(*part[d], d, row[d]);
        for (int w = 0; w < RowSet<Tile>::words; ++w) lanes_of_line.word[w] &= along.word[w];
      }
      const Interval line = Masked ? part[inner]->any : part[inner]->all;
      for (row[inner] = line.begin; row[inner] < line.end; ++row[inner]) {
        RowSet<Tile> with = lanes_of_line;
        if (Masked) {
          if (whole && row[inner] >= part[inner]->all.begin && row[inner] < part[inner]->all.end) continue;
          const RowSet<Tile> along = lanes_of<Tile>(*part[inner], inner, row[inner]);
          for (int w = 0; w < RowSet<Tile>::words; ++w) with.word[w] &= along.word[w];
        }
        add_row<Masked>(part, row, with);
      }
      int d = inner - 1;
      for (; d >= 0; --d) {
        if (++row[d] < (Masked ? part[d]->any.end : part[d]->all.end)) break;
        row[d] = Masked ? part[d]->any.begin : part[d]->all.begin;
      }
      if (d < 0) return;
    }
  }

  template <bool Masked>
  void add_row(const Part* const (&part)[rank], const int (&row)[rank], const RowSet<Tile>& with) {
    int stored[rank];
    for (int d = 0; d < rank; ++d) stored[d] = row[d] + part[d]->shift;
    if constexpr (of_keys) {
      lse_[gathered_] = *task_.at_query(plan_.log_sum_exp, head_, stored) * log2e;
      delta_[gathered_] = *task_.at_query(plan_.delta, head_, stored);
      append(task_.at_query(plan_.q, head_, stored), task_.at_query(plan_.grad_out, head_, stored));
    } else {
      append(task_.at_key(plan_.k, stored), task_.at_key(plan_.v, stored));
    }
    if (Masked) with_[gathered_ - 1] = with;
    if (gathered_ == batch_keys) flush<Masked>();
  }

  /// Adds a row of both tensors to the batch.
  void append(const Element* first, const Element* second) {
    const Element* const from[] = {first, second};
    float* to[2];
    for (int i = 0; i < 2; ++i) {
      to[i] = scratch_ + plan_.scratch.rows[i] + gathered_ * channels(i);
      widen(to[i], from[i], channels(i));
    }
    batch_.k[gathered_] = to[0];
    batch_.v[gathered_] = to[1];
    ++gathered_;
  }

  /// Gathers the extra keys that count, all of which every query sees.
  void gather_extra() {
    for (const ExtraPiece<Element>& piece : plan_.extra) {
      const std::int64_t count = piece.tokens > 0 ? piece.count(task_.batch) : 0;
      for (std::int64_t token = 0; token < count; ++token) {
        append(task_.at_extra(piece.k, token), task_.at_extra(piece.v, token));
        if (gathered_ == batch_keys) flush<false>();
      }
    }
  }

  /// All panels take the gathered rows.
  template <bool Masked>
  void flush() {
    if (gathered_ == 0) return;
    batch_.count = gathered_;
    for (int p = 0; p < panels; ++p) {
      if (!Masked) {
        take_rows<Masked>(p, batch_, {lse_, delta_});
        continue;
      }
      const int first = p * panel;
      KeyList seen;
      float lse[batch_keys], delta[batch_keys];
      seen.count = 0;
      for (int row = 0; row < gathered_; ++row) {
        const auto visible = static_cast<std::uint32_t>(with_[row].word[first / 64] >> (first % 64));
        seen.k[seen.count] = batch_.k[row];
        seen.v[seen.count] = batch_.v[row];
        seen.visible[seen.count] = visible;
        lse[seen.count] = lse_[row];
        delta[seen.count] = delta_[row];
        seen.count += (visible & panel_bits) != 0;
      }
      if (seen.count > 0) take_rows<Masked>(p, seen, {lse, delta});
    }
    gathered_ = 0;
  }

  /// Not inlined: the loops within are the kernel's time, and what else a caller does must not take their registers.
  template <bool Masked>
  [[gnu::noinline]] void take_rows(int p, KeyList& rows, Statistics of) {
    for (int more = 0; more < block_rows - 1; ++more) {  // up to a whole block
      rows.k[rows.count + more] = rows.k[rows.count - 1];
      rows.v[rows.count + more] = rows.v[rows.count - 1];
      if (Masked) rows.visible[rows.count + more] = rows.visible[rows.count - 1];
    }
    KeyList others;  // with the second tensor's rows first
    others.count = rows.count;
    for (int row = 0; row < rows.count + block_rows - 1; ++row) {
      others.k[row] = rows.v[row];
      others.v[row] = rows.k[row];
      if (Masked) others.visible[row] = rows.visible[row];
    }
    float* const scores = scratch_ + plan_.scratch.scores;
    float* const slopes = scratch_ + plan_.scratch.slopes;
    if constexpr (!of_keys) of = {scratch_ + plan_.scratch.lse + p * panel, scratch_ + plan_.scratch.delta + p * panel};
    Vector none[width], one[width];
    for (int w = 0; w < width; ++w) {
      none[w] = Vector{};
      one[w] = broadcast(1.0f);
    }
    score_keys<width, Masked>(rows, panel_of(plan_.scratch.lanes, 0, p), channels(0), scores, none);
    score_keys<width, false>(others, panel_of(plan_.scratch.lanes, 1, p), channels(1), slopes, none);
    if (Masked && careful_)
      differentiate<width, of_keys, Masked>(rows, scores, slopes, of);
    else
      differentiate<width, of_keys, false>(rows, scores, slopes, of);
    const auto add = [&](const KeyList& from, const float* factors, int i) {
      float* const sums = panel_of(plan_.scratch.sums, i, p);
      if (Masked && careful_)
        accumulate_visible<width>(from, factors, channels(i), one, sums);
      else
        accumulate<width>(from, factors, channels(i), one, sums);
    };
    if constexpr (of_keys) add(rows, scores, 1);
    add(others, slopes, 0);
  }

  /// Whether a gradient of a token that exists is a NaN.
  bool holds_nan(int i) const {
    for (int p = 0; p < panels; ++p)
      for (int w = 0; w < width; ++w) {
        IntVector is_nan{};
        for (int c = 0; c < channels(i); ++c) {
          const Vector value = load(panel_of(plan_.scratch.sums, i, p) + c * panel + w * lanes);
          is_nan |= value != value;
        }
        for (int lane = 0; lane < lanes; ++lane) {
          int position[rank];
          if (is_nan[lane] != 0 && locate(p * panel + w * lanes + lane, position) && counts(position)) return true;
        }
      }
    return false;
  }

  /// The gradient of the tile's tokens that exist.
  void store_sums(int i) const {
    for (int p = 0; p < panels; ++p) {
      const float* const sums = panel_of(plan_.scratch.sums, i, p);
      for (int lane = 0; lane < panel; lane += 4) {
        alignas(64) float row[4][max_head_dim];
        for (int c = 0; c < channels(i); c += 4) {
          Quad quad[4];
          for (int r = 0; r < 4; ++r) {
            quad[r] = *reinterpret_cast<const UnalignedQuad*>(sums + (c + r) * panel + lane);
            if (i == 0) quad[r] *= plan_.scale;
          }
          transpose(quad);
          for (int r = 0; r < 4; ++r) *reinterpret_cast<UnalignedQuad*>(row[r] + c) = quad[r];
        }
        for (int r = 0; r < 4; ++r) {
          int position[rank];
          if (locate(p * panel + lane + r, position)) store_row(i, position, row[r]);
        }
      }
    }
  }

  void store_row(int i, const int (&position)[rank], float* row) const {
    if (!counts(position)) std::memset(row, 0, sizeof(float) * channels(i));
    Element* to;
    bool accumulates = plan_.accumulates[i];
    if (task_.piece >= 0) {
      to = task_.at_extra(plan_.extra_grad[task_.piece][i], position[0]);
      accumulates = plan_.extra_accumulates[task_.piece][i];
    } else if constexpr (of_keys)
      to = task_.at_key(plan_.grad[i], position);
    else
      to = task_.at_query(plan_.grad[i], task_.head, position);
    if (accumulates) {
      alignas(64) float there[max_head_dim];
      widen(there, to, channels(i));
      for (int c = 0; c < channels(i); ++c) row[c] += there[c];
    }
    narrow(to, row, channels(i));
  }

  const Plan& plan_;
  const Task task_;
  float* const scratch_;
  AxisRows<extent> related_[rank];
  std::int64_t head_ = 0;
  bool careful_ = false;
  int gathered_ = 0;
  KeyList batch_;
  float lse_[batch_keys], delta_[batch_keys];  ///< Of the gathered rows, where they are queries.
  RowSet<Tile> with_[batch_keys];              ///< Lanes that have to do with them, where masked.
};

}  // namespace gnaforge::cpu::GNAFORGE_ISA
