// What of a backward_q kernel follows from its config: threads, registers, and where things lie in shared memory. Host
// and device.
#pragma once

#include "gnaforge/sm90/forward/layout.h"

namespace gnaforge::sm90::backward {

/// `Config` is as in entry.h.
template <class Config>
struct QLayout {
  static constexpr int max_tiles = (1 << 30) - 1;  ///< Q tiles of one launch.
  static constexpr bool may_fold = true;           ///< Heads into channels; see maps.h.
  static constexpr bool begins_early = true;       ///< See gpu/host.h.

  using QTile = typename Config::QTile;
  using KvTile = typename Config::KvTile;
  static constexpr int rank = QTile::rank;
  using Element = gpu::Element<Config::dtype>;
  static_assert(Config::out_dtype == Config::dtype, "the output's gradient has the inputs' dtype");
  static constexpr int head_dim = Config::head_dim;
  static constexpr int value_head_dim = Config::value_head_dim != 0 ? Config::value_head_dim : Config::head_dim;

  static constexpr int warpgroups = ceil_div(QTile::volume, warpgroup_rows);  ///< Consumers; one more loads.
  static constexpr int rows = warpgroups * warpgroup_rows;                    ///< With padding.
  static constexpr int columns = KvTile::volume;
  static constexpr int mma_depth = mma_bytes / Element::bytes;  ///< Channels or keys that one wgmma adds up.
  static constexpr int threads = (warpgroups + 1) * warpgroup_threads;

  static constexpr int chunk_channels = gpu::chunk_channels<Element>;
  static constexpr int qk_chunks = ceil_div(head_dim, chunk_channels);
  static constexpr int v_chunks = ceil_div(value_head_dim, chunk_channels);
  static constexpr int q_chunk_bytes = rows * row_bytes;
  static constexpr int kv_chunk_bytes = columns * row_bytes;
  static constexpr int kv_box_bytes = kv_chunk_bytes;  ///< What a copy brings.
  static constexpr int q_bytes = qk_chunks * q_chunk_bytes;
  static constexpr int grad_out_bytes = v_chunks * q_chunk_bytes;
  static constexpr int k_bytes = qk_chunks * kv_chunk_bytes;
  static constexpr int v_bytes = v_chunks * kv_chunk_bytes;
  using Columns = QuadColumns<KvTile>;
  static constexpr int facts_bytes = 512;  ///< Barriers and facts; see below.
  static constexpr int control_bytes = facts_bytes + Columns::table_bytes;
  static constexpr int blocks_per_processor = 1;

  /// Room of its own lets the next Q load while this gradient is stored; without, the gradient takes the place of Q.
  static constexpr int least_bytes = q_bytes + grad_out_bytes + 2 * (k_bytes + v_bytes) + control_bytes;
  static constexpr bool grad_apart = least_bytes + q_bytes <= gpu::shared_memory_limit;
  static constexpr int fixed_bytes = q_bytes + grad_out_bytes + (grad_apart ? q_bytes : 0) + control_bytes;
  static constexpr int stages = max_int(2, min_int(4, (gpu::shared_memory_limit - fixed_bytes) / (k_bytes + v_bytes)));

  static constexpr int q_offset = 0;
  static constexpr int grad_out_offset = q_bytes;
  static constexpr int grad_offset = grad_apart ? q_bytes + grad_out_bytes : 0;
  static constexpr int k_offset = q_bytes + grad_out_bytes + (grad_apart ? q_bytes : 0);
  static constexpr int v_offset = k_offset + stages * k_bytes;
  static constexpr int control_offset = v_offset + stages * v_bytes;
  static constexpr int shared_bytes = control_offset + control_bytes;
  static_assert(shared_bytes <= gpu::shared_memory_limit, "the tiles don't fit shared memory");

  // Barriers, 8 bytes each.
  static constexpr int q_full = control_offset;
  static constexpr int q_empty = q_full + 8;
  static constexpr int k_full = q_empty + 8;
  static constexpr int k_empty = k_full + 8 * stages;
  static constexpr int v_full = k_empty + 8 * stages;
  static constexpr int v_empty = v_full + 8 * stages;
  static constexpr int part_full = v_empty + 8 * stages;
  static constexpr int held_full = part_full + 8;  ///< One for each thread that stores.

  // What the producer tells the consumers, behind the barriers.
  static constexpr int q_facts = ceil_div(held_full + 8 * warpgroups, 16) * 16;  ///< For this Q tile and the next.
  static constexpr int kv_facts = q_facts + 2 * gpu::q_facts_bytes;              ///< For each stage.
  static constexpr int sides = kv_facts + gpu::kv_facts_bytes * stages;  ///< The producer's own; see lane_tiles.h.
  static constexpr int mask_table = control_offset + facts_bytes;
  static_assert(sides + 16 * rank <= mask_table - Columns::parts * Columns::entry_bytes,
                "room for what the consumers are told");

  /// True if each warpgroup's rows are a box by themselves, which it stores without waiting for the others.
  static constexpr bool stores_by_warpgroup =
      QTile::volume == rows && (warpgroups == 1 || warpgroup_rows % QTile::pitch(0) == 0);
  /// Queries along the outermost axis that one warpgroup stores.
  static constexpr int grad_extent = stores_by_warpgroup ? QTile::extent(0) / warpgroups : QTile::extent(0);

  static constexpr int grad_box_bytes = QTile::volume / QTile::extent(0) * grad_extent * row_bytes;  ///< Of a chunk.

  /// Extents of what one copy loads of Q and of the output's gradient, and stores of Q's.
  static constexpr int q_box(int axis) { return QTile::extents[axis]; }
  static constexpr int grad_box(int axis) { return axis == 0 ? grad_extent : QTile::extents[axis]; }

  /// Registers per thread after launch, shared out of what it gave: 384 x 168 or 512 x 128. One consumer and one
  /// producer may both have 255.
  static constexpr int producer_registers = warpgroups == 3 ? 32 : 40;
  static constexpr int consumer_registers = warpgroups == 3 ? 160 : 232;
  static constexpr bool shares_registers = warpgroups > 1;
  static_assert(warpgroups <= 3, "at most 192 query rows");
};

}  // namespace gnaforge::sm90::backward
