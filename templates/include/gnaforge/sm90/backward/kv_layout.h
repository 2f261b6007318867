// What of a kernel of dK and dV follows from its config: threads, registers, and where things lie in shared memory.
// Host and device.
#pragma once

#include <cstdint>

#include "gnaforge/abi.h"
#include "gnaforge/gna/query_runs.h"
#include "gnaforge/gpu/element.h"
#include "gnaforge/gpu/shared_memory.h"
#include "gnaforge/sm90/forward/layout.h"
#include "gnaforge/sm90/forward/quad_columns.h"

namespace gnaforge::sm90::backward {

/// `Config` is as in entry.h. Keys are the rows of products, queries their columns.
///
/// Up to 128 channels a warpgroup has 64 keys, and both gradients of them. Beyond (`wide`) registers hold one gradient:
/// two warpgroups have the same 64 keys, the first one dV and the second one dK.
template <class Config>
struct KvLayout {
  static constexpr int max_tiles = (1 << 30) - 1;  ///< Tiles of one launch.
  static constexpr bool may_fold = true;           ///< Heads into channels; see maps.h.
  static constexpr bool begins_early = true;       ///< See gpu/host.h.

  using QTile = typename Config::QTile;
  using KvTile = typename Config::KvTile;
  static constexpr int rank = QTile::rank;
  using Element = gpu::Element<Config::dtype>;
  static_assert(Config::out_dtype == Config::dtype, "gradients have the inputs' dtype");
  static constexpr int head_dim = Config::head_dim;
  static constexpr int value_head_dim = Config::value_head_dim != 0 ? Config::value_head_dim : Config::head_dim;

  static constexpr bool wide = max_int(head_dim, value_head_dim) > 128;
  static constexpr int key_groups = ceil_div(KvTile::volume, warpgroup_rows);
  static constexpr int warpgroups = wide ? 2 : key_groups;      ///< Consumers; one more loads.
  static constexpr int key_rows = key_groups * warpgroup_rows;  ///< With padding.
  static constexpr int mma_depth = mma_bytes / Element::bytes;  ///< Channels or queries that one wgmma adds up.
  static constexpr int queries = QTile::volume;                 ///< Columns of products.
  static constexpr int rows = queries, columns = key_rows;      ///< As host.h names them.
  static constexpr int threads = (warpgroups + 1) * warpgroup_threads;
  static_assert(queries % mma_depth == 0, "products add up whole steps of queries");
  static_assert(warpgroups <= 2, "at most 128 keys");
  static_assert(!wide || key_groups == 1, "two warpgroups with the same keys");

  static constexpr int chunk_channels = gpu::chunk_channels<Element>;
  static constexpr int qk_chunks = ceil_div(head_dim, chunk_channels);
  static constexpr int v_chunks = ceil_div(value_head_dim, chunk_channels);
  static constexpr int kv_chunk_bytes = key_rows * row_bytes;
  static constexpr int q_chunk_bytes = queries * row_bytes;
  static constexpr int k_bytes = qk_chunks * kv_chunk_bytes;
  static constexpr int v_bytes = v_chunks * kv_chunk_bytes;
  static constexpr int q_bytes = qk_chunks * q_chunk_bytes;
  static constexpr int grad_out_bytes = v_chunks * q_chunk_bytes;

  using Columns = QuadColumns<QTile>;
  static_assert(Columns::words == 1, "a thread's columns of a tile fit a word");

  /// Rows of the table of what keys are seen by, in 8 bytes each: an entry per coordinate of the KV tile along each
  /// axis, and that once per run of Q tiles.
  GNAFORGE_HD static constexpr int first_coordinate(int axis) {
    return (axis > 0 ? KvTile::extent(0) : 0) + (axis > 1 ? KvTile::extent(1) : 0) + (axis > 2 ? KvTile::extent(2) : 0);
  }
  static constexpr int coordinates = first_coordinate(rank);
  static constexpr int run_bytes = 8 * coordinates;

  static constexpr int statistics_bytes = 8 * queries;
  static constexpr int most_stages = 4;
  static constexpr int tile_facts_bytes = 32, stage_facts_bytes = 32;
  static constexpr int barriers_bytes = 8 * (2 + 3 * most_stages + 2);
  static constexpr int control_bytes = ceil_div(barriers_bytes, 16) * 16 + tile_facts_bytes +
                                       most_stages * stage_facts_bytes + Columns::table_bytes +
                                       ceil_div(most_images * run_bytes, 16) * 16;
  static constexpr int stage_bytes = q_bytes + grad_out_bytes + statistics_bytes;
  static constexpr int stages =
      max_int(2, min_int(most_stages, (gpu::shared_memory_limit - k_bytes - v_bytes - control_bytes) / stage_bytes));

  static constexpr int k_offset = 0;
  static constexpr int v_offset = k_bytes;
  static constexpr int q_offset = v_offset + v_bytes;
  static constexpr int grad_out_offset = q_offset + stages * q_bytes;
  static constexpr int statistics = grad_out_offset + stages * grad_out_bytes;  ///< Log-sum-exps, then deltas.
  static constexpr int control_offset = statistics + stages * statistics_bytes;
  static constexpr int shared_bytes = control_offset + control_bytes;
  static_assert(shared_bytes <= gpu::shared_memory_limit, "the tiles don't fit shared memory");

  // Barriers, 8 bytes each; see kv_kernel.h.
  static constexpr int kv_full = control_offset;
  static constexpr int kv_empty = kv_full + 8;
  static constexpr int q_full = kv_empty + 8;
  static constexpr int grad_out_full = q_full + 8 * stages;
  static constexpr int empty = grad_out_full + 8 * stages;
  static constexpr int held_full = empty + 8 * stages;  ///< One for each thread that stores.

  static constexpr int tile_facts = control_offset + ceil_div(barriers_bytes, 16) * 16;
  static constexpr int stage_facts = tile_facts + tile_facts_bytes;
  static constexpr int mask_table = stage_facts + most_stages * stage_facts_bytes;
  static constexpr int seen_table = mask_table + Columns::table_bytes;

  static constexpr int blocks_per_processor = 1;

  /// True if each warpgroup's keys are a box by themselves, which it stores without waiting for the others.
  static constexpr bool stores_by_warpgroup =
      !wide && KvTile::volume == key_rows && (warpgroups == 1 || warpgroup_rows % KvTile::pitch(0) == 0);
  /// Keys along the outermost axis that one copy stores.
  static constexpr int grad_extent = stores_by_warpgroup ? KvTile::extent(0) / warpgroups : KvTile::extent(0);

  static constexpr int grad_box_bytes = KvTile::volume / KvTile::extent(0) * grad_extent * row_bytes;  ///< Of a chunk.

  static constexpr int q_box(int axis) { return QTile::extents[axis]; }
  static constexpr int grad_box(int axis) { return axis == 0 ? grad_extent : KvTile::extents[axis]; }

  /// Registers per thread after launch, shared out of what it gave: 384 x 168. One consumer and the warps that load may
  /// all have 255.
  static constexpr int producer_registers = 56;
  static constexpr int consumer_registers = 224;
  static constexpr bool shares_registers = warpgroups > 1;
};

}  // namespace gnaforge::sm90::backward
