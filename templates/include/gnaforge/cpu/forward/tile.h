// The forward pass of one Q tile, flash-style with queries in lanes. No include guard, see vector.h.

namespace gnaforge::cpu::GNAFORGE_ISA {

/// Vectors that a panel is wide: two hide more of the loads, one where two would leave a quarter of the lanes idle.
template <int Rows>
constexpr int panel_width() {
  constexpr int vectors = (Rows + lanes - 1) / lanes;
  return vectors % 2 == 0 || vectors > 4 ? 2 : 1;
}

/// Where a Q tile's walk over its KV tiles stands. Keys are gathered into batches that tiles fill one after the other.
template <class Config>
class Forward {
  using Source = TileSource<Config>;
  using List = typename Source::List;
  using Walk = typename Source::Walk;
  using QTile = typename Config::QTile;
  using KvTile = typename Config::KvTile;
  using Element = typename Plan<Config>::Element;
  static constexpr int rank = QTile::rank;
  static constexpr int width = panel_width<QTile::volume>();
  static constexpr int panel = width * lanes;
  static constexpr int panels = (QTile::volume + panel - 1) / panel;
  static_assert(64 % panel == 0 && panels * panel <= (QTile::volume + row_padding - 1) / row_padding * row_padding);

 public:
  /// Works on tasks until `next` runs past the last.
  static void run(const Plan<Config>& plan, float* scratch, std::atomic<std::int64_t>& next) {
    for (std::int64_t index = next++; index < plan.tasks; index = next++) {
      Forward tile(plan, Task<Config>(plan, index), scratch);
      // NaN is either the answer, or 0 times a value that isn't finite and that the query doesn't see.
      if (!tile.attend(false)) tile.attend(true);
    }
  }

 private:
  Forward(const Plan<Config>& plan, const Task<Config>& task, float* scratch)
      : plan_(plan), task_(task), scratch_(scratch), rows_(task_.band, task_.q_begin) {}

  /// Computes and stores the tile; false if it stored a NaN. Where `careful`, values that are not finite reach only
  /// the queries that see them.
  bool attend(bool careful) {
    careful_ = careful;
    load_queries();
    const List tiles = Source::list(task_.band, task_.q_begin);
    Walk walk;
    walk.begin(tiles);
    gathered_ = 0;
    for (const ExtraPiece<Element>& piece : plan_.extra)
      if (piece.tokens > 0) gather_extra(piece);
    for (int index = 0; index < tiles.count; ++index) {
      if (index > 0) walk.step(tiles, index);
      if (Source::kind(tiles, index) == TileKind::interior) {
        gather<false>(tiles, walk);
        if (index + 1 == tiles.interior) flush<false>();
      } else {
        gather<true>(tiles, walk);
      }
    }
    flush<true>();
    count_tiles_done(tiles);
    return store_results();
  }

  float* panel_of(std::int64_t part, int channels, int p) const { return scratch_ + part + p * channels * panel; }

  /// Position of a row of the tile; false if no such query exists.
  bool locate(int row, int (&position)[rank]) const {
    bool exists = row < QTile::volume;
    for (int d = 0; d < rank; ++d) {
      position[d] = task_.q_begin[d] + row / QTile::pitch(d) % QTile::extents[d];
      exists = exists && position[d] < task_.band[d].queries;
    }
    return exists;
  }

  /// Q^T, scaled, and an empty softmax. Rows that don't exist are 0.
  void load_queries() {
    const int head_dim = plan_.head_dim;
    for (int p = 0; p < panels; ++p) {
      float* q = panel_of(plan_.scratch.q, head_dim, p);
      for (int lane = 0; lane < panel; lane += 4) {
        alignas(64) float row[4][max_head_dim];
        for (int i = 0; i < 4; ++i) {
          int position[rank];
          if (locate(p * panel + lane + i, position))
            widen(row[i], task_.at_query(plan_.q, plan_, position), head_dim);
          else
            std::memset(row[i], 0, sizeof(float) * head_dim);
        }
        for (int d = 0; d < head_dim; d += 4) {
          Quad quad[4];
          for (int i = 0; i < 4; ++i) quad[i] = *reinterpret_cast<const UnalignedQuad*>(row[i] + d) * plan_.scale;
          transpose(quad);
          for (int i = 0; i < 4; ++i) *reinterpret_cast<UnalignedQuad*>(q + (d + i) * panel + lane) = quad[i];
        }
      }
      for (int w = 0; w < width; ++w) {
        softmax_[p].max[w] = broadcast(-__builtin_inff());
        softmax_[p].sum[w] = Vector{};
      }
    }
    std::memset(scratch_ + plan_.scratch.out, 0, sizeof(float) * plan_.value_head_dim * panels * panel);
  }

  /// Adds the keys of a KV tile to the batch, attending whenever it is full. Keys that no query sees are left out, so
  /// none that doesn't exist is touched.
  template <bool Masked>
  void gather(const List& tiles, const Walk& walk) {
    int origin[rank], count[rank];
    int lines = 1;
    RowSet<QTile> rows[rank][Masked ? max_extent() : 1];
    for (int d = 0; d < rank; ++d) {
      const Interval seen = Source::rows(tiles, walk, d);
      count[d] = seen.end - seen.begin;
      origin[d] = stored_row(task_.band[d], seen.begin, count[d]);
      if (d < rank - 1) lines *= count[d];
      if (Masked) rows_.rows_that_see(d, seen.begin, count[d], rows[d]);
    }
    constexpr int inner = rank - 1;
    const std::int64_t k_step = plan_.k.token_stride[inner] * plan_.axis[inner].axis.dilation;
    const std::int64_t v_step = plan_.v.token_stride[inner] * plan_.axis[inner].axis.dilation;
    for (int line = 0; line < lines; ++line) {
      int position[rank];
      RowSet<QTile> seen_by;
      for (auto& word : seen_by.word) word = ~0ull;
      int rest = line;
      for (int d = inner - 1; d >= 0; --d) {
        const int step = rest % count[d];
        rest /= count[d];
        position[d] = origin[d] + step;
        if (Masked)
          for (int w = 0; w < RowSet<QTile>::words; ++w) seen_by.word[w] &= rows[d][step].word[w];
      }
      position[inner] = origin[inner];
      const Element* k = task_.at_key(plan_.k, plan_, position);
      const Element* v = task_.at_key(plan_.v, plan_, position);
      for (int x = 0; x < count[inner]; ++x) {
        const int slot = gather_key(k + x * k_step, v + x * v_step);
        if (Masked) {
          seen_by_[slot] = seen_by;
          for (int w = 0; w < RowSet<QTile>::words; ++w) seen_by_[slot].word[w] &= rows[inner][x].word[w];
        }
        if (gathered_ == batch_keys) flush<Masked>();
      }
    }
  }

  /// The slot that a key and its value take in the batch.
  int gather_key(const Element* k, const Element* v) {
    const int slot = gathered_++;
    float* const key = scratch_ + plan_.scratch.k + slot * plan_.head_dim;
    float* const value = scratch_ + plan_.scratch.v + slot * plan_.value_head_dim;
    widen(key, k, plan_.head_dim);
    widen(value, v, plan_.value_head_dim);
    batch_.k[slot] = key;
    batch_.v[slot] = value;
    return slot;
  }

  /// Adds keys that all queries see: whole batches need no mask, and what is left joins any batch.
  void gather_extra(const ExtraPiece<Element>& piece) {
    const Element* k = piece.k.data + task_.batch * piece.k.batch_stride + task_.kv_head * piece.k.head_stride;
    const Element* v = piece.v.data + task_.batch * piece.v.batch_stride + task_.kv_head * piece.v.head_stride;
    const std::int64_t count = piece.count(task_.batch);
    for (std::int64_t token = 0; token < count; ++token) {
      const int slot = gather_key(k + token * piece.k.token_stride[0], v + token * piece.v.token_stride[0]);
      for (auto& word : seen_by_[slot].word) word = ~0ull;
      if (gathered_ == batch_keys) flush<false>();
    }
  }

  static constexpr int max_extent() {
    int extent = 1;
    for (int d = 0; d < rank; ++d) extent = max_int(extent, KvTile::extents[d]);
    return extent;
  }

  /// All panels attend to the gathered keys.
  template <bool Masked>
  void flush() {
    if (gathered_ == 0) return;
    batch_.count = gathered_;
    if (!Masked) pad<false>(batch_);
    for (int p = 0; p < panels; ++p) {
      if (!Masked) {
        attend<Masked>(p, batch_);
        continue;
      }
      const int first = p * panel;
      KeyList seen;
      seen.count = 0;
      for (int key = 0; key < gathered_; ++key) {
        const auto visible = static_cast<std::uint32_t>(seen_by_[key].word[first / 64] >> (first % 64));
        seen.k[seen.count] = batch_.k[key];
        seen.v[seen.count] = batch_.v[key];
        seen.visible[seen.count] = visible;
        seen.count += (visible & panel_bits) != 0;
      }
      if (seen.count == 0) continue;
      pad<true>(seen);
      attend<Masked>(p, seen);
    }
    gathered_ = 0;
  }

  static constexpr std::uint32_t panel_bits = ~0u >> (32 - panel);

  /// Repeats the last key up to a whole block.
  template <bool Masked>
  static void pad(KeyList& keys) {
    for (int extra = 0; extra < block_rows - 1; ++extra) {
      keys.k[keys.count + extra] = keys.k[keys.count - 1];
      if (Masked) keys.visible[keys.count + extra] = keys.visible[keys.count - 1];
    }
  }

  /// Not inlined: the loops within are the kernel's time, and what else a caller does must not take their registers.
  template <bool Masked>
  [[gnu::noinline]] void attend(int p, const KeyList& keys) {
    Softmax<width>& softmax = softmax_[p];
    float* scores = scratch_ + plan_.scratch.scores;
    float* out = panel_of(plan_.scratch.out, plan_.value_head_dim, p);
    Vector max[width], rescale[width];
    for (int w = 0; w < width; ++w) max[w] = softmax.max[w];
    score_keys<width, Masked>(keys, panel_of(plan_.scratch.q, plan_.head_dim, p), plan_.head_dim, scores, max);
    exponentiate<width>(keys.count, scores, max, softmax, rescale);
    if (Masked && careful_)
      accumulate_visible<width>(keys, scores, plan_.value_head_dim, rescale, out);
    else
      accumulate<width>(keys, scores, plan_.value_head_dim, rescale, out);
  }

  /// O and the log-sum-exp of the rows that exist; false if O holds a NaN.
  bool store_results() const {
    const int channels = plan_.value_head_dim;
    bool has_nan = false;
    for (int p = 0; p < panels; ++p) {
      const float* out = panel_of(plan_.scratch.out, channels, p);
      alignas(64) float max[panel], sum[panel];
      for (int w = 0; w < width; ++w) {
        store(max + w * lanes, softmax_[p].max[w]);
        store(sum + w * lanes, softmax_[p].sum[w]);
      }
      for (int lane = 0; lane < panel; lane += 4) {
        int position[4][rank];
        bool exists[4], any = false;
        for (int i = 0; i < 4; ++i) {
          exists[i] = locate(p * panel + lane + i, position[i]);
          any = any || exists[i];
        }
        if (!any) continue;
        alignas(64) float row[4][max_head_dim];
        const Quad inverse = 1.0f / *reinterpret_cast<const UnalignedQuad*>(sum + lane);
        IntQuad is_nan{};
        for (int c = 0; c < channels; c += 4) {
          Quad quad[4];
          for (int i = 0; i < 4; ++i) {
            quad[i] = *reinterpret_cast<const UnalignedQuad*>(out + (c + i) * panel + lane) * inverse;
            is_nan |= quad[i] != quad[i];
          }
          transpose(quad);
          for (int i = 0; i < 4; ++i) *reinterpret_cast<UnalignedQuad*>(row[i] + c) = quad[i];
        }
        for (int i = 0; i < 4; ++i) {
          if (!exists[i]) continue;
          has_nan = has_nan || is_nan[i] != 0;
          narrow(task_.at_query(plan_.out, plan_, position[i]), row[i], channels);
          // Relative to infinity, a score of infinity has no probability, and the sum is a NaN.
          const bool infinite = max[lane + i] == __builtin_inff();
          if (plan_.log_sum_exp.data != nullptr)
            *task_.at_query(plan_.log_sum_exp, plan_, position[i]) =
                infinite ? max[lane + i] : max[lane + i] * 0.693147181f + __builtin_logf(sum[lane + i]);
        }
      }
    }
    return !has_nan;
  }

  static void count_tiles_done([[maybe_unused]] const List& tiles) {
#if defined(GNAFORGE_COUNT_TILES)
    gnaforge_visited_tiles += tiles.count;
    gnaforge_interior_tiles += tiles.interior;
#endif
  }

  const Plan<Config>& plan_;
  const Task<Config> task_;
  float* const scratch_;
  const TileRows<Source> rows_;
  bool careful_ = false;
  int gathered_ = 0;
  Softmax<width> softmax_[panels];
  KeyList batch_;
  RowSet<QTile> seen_by_[batch_keys];  ///< Rows that see the gathered keys, where masked. Extra keys have all bits.
};

}  // namespace gnaforge::cpu::GNAFORGE_ISA
