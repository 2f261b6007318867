// What of a kernel follows from its config: roles of warps, registers, and where things lie in shared memory and in
// tensor memory. Host and device.
#pragma once

#include <cstdint>
#include <type_traits>

#include "gnaforge/abi.h"
#include "gnaforge/gna/band_tiles.h"
#include "gnaforge/gpu/calls_params.h"
#include "gnaforge/gpu/descale.h"
#include "gnaforge/gpu/element.h"
#include "gnaforge/gpu/half_tile.h"
#include "gnaforge/gpu/shared_memory.h"
#include "gnaforge/sm100/forward/factors.h"
#include "gnaforge/sm100/forward/short_tiles.h"

namespace gnaforge::sm100 {

using gpu::row_bytes;

/// What the kernel takes of a call beside what those of sm90 do.
template <class Config>
using OfCall = std::conditional_t<Factors<Config::dtype>::scaled, gpu::Descales, gpu::NothingMore>;
template <class Config>
using Params = gpu::CallsParams<Config::QTile::rank, gpu::StoredBy::threads, OfCall<Config>>;

constexpr int half_rows = 128;       ///< Of one product, and lanes of tensor memory: a row each.
constexpr int mma_bytes = 32;        ///< Of the factors of one product: bytes of a row, along which it adds up.
constexpr int tensor_columns = 512;  ///< Of tensor memory, all of which a thread block takes.
constexpr int warpgroup_threads = 128;

/// Which KV tiles the kernel visits; see gna/source.h.
template <class Config>
using TileSource = BandTiles<typename Config::QTile, typename Config::KvTile>;

constexpr int round_up(int x, int multiple) { return ceil_div(x, multiple) * multiple; }

/// A Q tile that is one box, as HalfTile has one of two.
template <class QTile>
struct WholeTile {
  static constexpr int rank = QTile::rank, volume = QTile::volume, axis = 0, common = 0;
  GNAFORGE_HD static constexpr int extent(int d) { return QTile::extent(d); }
  GNAFORGE_HD static constexpr int pitch(int d) { return QTile::pitch(d); }
  GNAFORGE_HD static constexpr int begin(int, int) { return 0; }
};

/// `Config` is as in entry.h.
template <class Config>
struct Layout {
  static constexpr int max_tiles = (1 << 30) - 1;  ///< Q tiles of one launch.
  static constexpr bool begins_early = true;       ///< See host.h.
  static constexpr auto stored_by = gpu::StoredBy::threads;

  using QTile = typename Config::QTile;
  using KvTile = typename Config::KvTile;
  static constexpr int rank = QTile::rank;
  using Element = gpu::Element<Config::dtype>;
  using OutElement = gpu::Element<Config::out_dtype>;
  using Factors = sm100::Factors<Config::dtype>;
  using OfCall = sm100::OfCall<Config>;
  static_assert(OutElement::bytes == 2 && (Element::bytes == 1 || Config::out_dtype == Config::dtype),
                "the output is of 16 bits, and of inputs of 16 bits it has the dtype");
  static constexpr int head_dim = Config::head_dim;
  static constexpr int value_head_dim = Config::value_head_dim != 0 ? Config::value_head_dim : Config::head_dim;

  static constexpr int heads = Config::q_tile_heads;  ///< Of a Q tile: each token has a row for each of them.
  static constexpr bool may_fold = heads == 1;        ///< Heads into channels, see maps.h: a box has one then.

  /// More than 128 rows are two halves that take turns on the tensor cores; else one half has scores of two KV tiles.
  static constexpr bool pair = QTile::volume * heads > half_rows;
  static constexpr int halves = pair ? 2 : 1;
  using Half = std::conditional_t<pair, gpu::HalfTile<QTile, half_rows / heads>, WholeTile<QTile>>;
  static constexpr int half_queries = Half::volume * heads;  ///< Rows of a half that aren't padding.
  static constexpr int rows = halves * half_rows;            ///< With padding.
  static constexpr int columns = KvTile::volume;
  static_assert(columns % 16 == 0 && columns <= 128, "columns of one product, and of a thread's registers");
  static constexpr int words = ceil_div(columns, 32);           ///< Of bits, one for each column.
  static constexpr int mma_depth = mma_bytes / Element::bytes;  ///< Channels or keys that one product adds up.
  using Short = ShortTiles<KvTile>;

  /// The token of a row along an axis, within its half, and its head, within the tile: heads are innermost.
  GNAFORGE_HD static constexpr int token(int row, int d) { return row / (Half::pitch(d) * heads) % Half::extent(d); }
  GNAFORGE_HD static constexpr int head(int row) { return row % heads; }

  static constexpr int q_box(int axis) { return Half::extent(axis); }
  static constexpr int out_box(int axis) { return Half::extent(axis); }

  // Shared memory: Q, a ring of stages of K and V in turn, and what warps tell each other.
  static constexpr int chunk_channels = gpu::chunk_channels<Element>;
  static constexpr int qk_chunks = ceil_div(head_dim, chunk_channels);
  static constexpr int v_chunks = ceil_div(value_head_dim, chunk_channels);
  static constexpr int q_chunk_bytes = half_rows * row_bytes;
  static constexpr int kv_rows = round_up(columns, mma_depth);  ///< P V adds up so many; those of no key are zero.
  static constexpr int kv_chunk_bytes = kv_rows * row_bytes;
  static constexpr int kv_box_bytes = columns * row_bytes;  ///< Of it, what a copy brings.
  static constexpr int half_bytes = qk_chunks * q_chunk_bytes;
  static constexpr int stage_bytes = max_int(qk_chunks, v_chunks) * kv_chunk_bytes;
  static constexpr int control_bytes = 5 * 1024;
  static constexpr int q_offset = 0;
  static constexpr int kv_offset = halves * half_bytes;
  static constexpr int most_stages = 12;
  static constexpr int stages =
      min_int(most_stages, (gpu::shared_memory_limit - kv_offset - control_bytes) / stage_bytes);
  static_assert(stages >= 2, "the tiles don't fit shared memory");
  static constexpr int control_offset = kv_offset + stages * stage_bytes;
  static constexpr int shared_bytes = control_offset + control_bytes;

  // Tensor memory, in columns: two buffers of scores, outputs, and probabilities if they don't take the scores' place.
  static constexpr int score_columns = round_up(columns, 32);
  static constexpr int out_channels = round_up(value_head_dim, 16);
  GNAFORGE_HD static constexpr int scores(int buffer) { return buffer * score_columns; }
  GNAFORGE_HD static constexpr int out(int half) { return 2 * score_columns + half * out_channels; }
  static constexpr int q_tensor = 2 * score_columns + halves * out_channels;
  static constexpr int q_columns = round_up(head_dim, mma_depth) * Element::bytes / 4;
  static_assert(q_tensor <= tensor_columns, "the tiles don't fit tensor memory");
  /// Two halves have P in columns of its own, where there is room: the next scores then needn't wait for P V.
  static constexpr int p_columns = kv_rows * Element::bytes / 4;
  static constexpr bool p_apart = pair && q_tensor + 2 * p_columns <= tensor_columns;
  GNAFORGE_HD static constexpr int p(int buffer) { return p_apart ? q_tensor + buffer * p_columns : scores(buffer); }
  /// Of P, that the MMA warp hears of first: all but the last word. Where that is half of a fourth one, more than 3/4
  /// of the exponentials would come before it: there all but the last 32. Not where P is apart, or bytes: such kernels
  /// wait for their exponentials, not for products, and would take longer.
  static constexpr bool splits_earlier = words > 3 && columns % 32 != 0 && !p_apart && Element::bytes == 2;
  /// Of so many columns that are computed.
  GNAFORGE_HD static constexpr int first_columns(int computed) {
    if (splits_earlier && computed == columns) return columns - 32;
    return computed > 32 ? (ceil_div(computed, 32) - 1) * 32 : computed;
  }
  /// One half leaves a warpgroup idle: it copies Q to tensor memory, where there is room. Products then read shared
  /// memory for K alone.
  static constexpr bool q_from_tensor = !pair && q_tensor + q_columns <= tensor_columns;

  // Barriers, 8 bytes each; see kernel.h.
  static constexpr int q_full = control_offset;        ///< Of each half,
  static constexpr int q_empty = q_full + 8 * 2;       ///< likewise.
  static constexpr int scores_full = q_empty + 8 * 2;  ///< Of each buffer of scores,
  static constexpr int p_first = scores_full + 8 * 2;  ///< likewise,
  static constexpr int p_last = p_first + 8 * 2;       ///< likewise.
  static constexpr int out_full = p_last + 8 * 2;      ///< Of each half,
  static constexpr int out_empty = out_full + 8 * 2;   ///< likewise.
  static constexpr int out_done = out_empty + 8 * 2;   ///< Of one half, or of each that has P apart from scores;
  static constexpr int scores_read = out_done + 8 * (p_apart ? 2 : 1);  ///< of these alone.
  static constexpr int q_copied = scores_read + 8 * (p_apart ? 2 : 0);  ///< Of Q in tensor memory,
  static constexpr int q_used = q_copied + 8;                           ///< likewise.
  static constexpr int statistics_full = q_used + 8;                    ///< Of each half, of this Q tile and the next.
  static constexpr int q_facts_full = statistics_full + 8 * 4;
  static constexpr int q_facts_slots = 4;  ///< The next Q tile may load while the last one is stored.
  static constexpr int kv_facts_full = q_facts_full + 8 * q_facts_slots;
  static constexpr int kv_facts_slots = 8;
  static_assert(stages / 2 + 1 <= kv_facts_slots, "KV tiles whose softmax has not begun");
  static constexpr int kv_full = kv_facts_full + 8 * kv_facts_slots;  ///< Of each stage,
  static constexpr int kv_empty = kv_full + 8 * stages;               ///< likewise.

  // What warps tell each other, behind the barriers.
  static constexpr int q_facts = round_up(kv_empty + 8 * stages, 16);
  static constexpr int q_slot_bytes = gpu::q_facts_bytes + (Short::any ? 16 : 0);  ///< With ShortFacts.
  static constexpr int kv_facts = q_facts + q_slot_bytes * q_facts_slots;
  static constexpr int sides = kv_facts + gpu::kv_facts_bytes * kv_facts_slots;  ///< See lane_tiles.h.
  static constexpr int tensor_base = sides + 16 * rank;                          ///< Where tensor memory begins.
  static constexpr int zero = tensor_base + 4;                                   ///< A word that is 0.
  static constexpr int statistics = control_offset + 1024;  ///< [this Q tile or the next][half][row]{shift, sum}
  static constexpr int statistics_bytes = 8;
  static_assert(zero + 4 <= statistics, "room for what warps tell each other");
  static_assert(statistics + 2 * 2 * half_rows * statistics_bytes <= shared_bytes, "room for statistics");

  // Warpgroup 0 loads and issues products, 1 and 2 do the softmax of a half each, 3 stores the output.
  static constexpr int threads = 4 * warpgroup_threads;
  static constexpr int blocks_per_processor = 1;
  static constexpr int load_warp = 0, mma_warp = 1;
  static constexpr int softmax_registers = 192, other_registers = 64;
  static_assert(2 * softmax_registers + 2 * other_registers == 512, "all registers that the block has");

  /// Of 16 pairs of exponentials in all words but the last, those that FMAs compute: 28 % of all at 128 columns. None
  /// in the last word, for which the product waits.
  static constexpr int pairs_by_fma = 6;
  /// Columns that have such, of so many.
  GNAFORGE_HD static constexpr int columns_by_fma(int computed) { return (ceil_div(computed, 32) - 1) * 32; }
};

}  // namespace gnaforge::sm100
