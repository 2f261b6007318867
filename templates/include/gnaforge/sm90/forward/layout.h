// What of a kernel follows from its config: threads, registers, and where things lie in shared memory. Host and device.
#pragma once

#include <cstdint>

#include "gnaforge/abi.h"
#include "gnaforge/gna/band_tiles.h"
#include "gnaforge/gpu/calls_params.h"
#include "gnaforge/gpu/element.h"
#include "gnaforge/gpu/shared_memory.h"
#include "gnaforge/sm90/forward/quad_columns.h"

namespace gnaforge::sm90 {

using gpu::row_bytes;

template <int Rank>
using Params = gpu::CallsParams<Rank, gpu::StoredBy::copies>;

constexpr int half_shared_memory_limit = 113 * 1024;  ///< Of two blocks on one multiprocessor; each takes 1 KB more.

/// Rows of one wgmma, and so of one consumer warpgroup.
constexpr int warpgroup_rows = 64;
constexpr int warpgroup_threads = 128;

/// Of the factors of one wgmma: bytes of a row, along which it adds up.
constexpr int mma_bytes = 32;

/// Which KV tiles the kernel visits; see gna/source.h.
template <class Config>
using TileSource = BandTiles<typename Config::QTile, typename Config::KvTile>;

/// `Config` is as in entry.h.
template <class Config>
struct Layout {
  static constexpr int max_tiles = (1 << 30) - 1;  ///< Q tiles of one launch.
  static constexpr bool may_fold = true;           ///< Heads into channels; see maps.h.
  static constexpr bool begins_early = true;       ///< See host.h.
  static constexpr auto stored_by = gpu::StoredBy::copies;

  using QTile = typename Config::QTile;
  using KvTile = typename Config::KvTile;
  static constexpr int rank = QTile::rank;
  using Element = gpu::Element<Config::dtype>;
  using OfCall = gpu::NothingMore;
  static_assert(Config::out_dtype == Config::dtype, "the output has the inputs' dtype");
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
  static constexpr int out_bytes = v_chunks * q_chunk_bytes;
  static constexpr int k_bytes = qk_chunks * kv_chunk_bytes;
  static constexpr int v_bytes = v_chunks * kv_chunk_bytes;
  using Columns = QuadColumns<KvTile>;
  static constexpr int facts_bytes = 512;  ///< Barriers and facts; see below.
  static constexpr int control_bytes = facts_bytes + Columns::table_bytes;

  /// What ptxas needs of the registers that a thread has at launch, whatever it asks for later: all of one product.
  static constexpr int launch_registers = max_int(columns, value_head_dim) / 2 + 32;

  /// Two thread blocks on a multiprocessor where each has one warpgroup only, and so nothing else that computes while
  /// its softmax runs or its output leaves.
  static constexpr bool two_blocks =
      warpgroups == 1 && launch_registers <= 128 &&
      q_bytes + out_bytes + 2 * (k_bytes + v_bytes) + control_bytes <= half_shared_memory_limit;
  static constexpr int blocks_per_processor = two_blocks ? 2 : 1;
  static constexpr int block_limit = two_blocks ? half_shared_memory_limit : gpu::shared_memory_limit;

  /// Room of its own lets the next Q load while this output is stored; without, the output takes the place of Q.
  static constexpr bool out_apart = q_bytes + out_bytes + 2 * (k_bytes + v_bytes) + control_bytes <= block_limit;
  static constexpr int q_region = out_apart ? q_bytes : max_int(q_bytes, out_bytes);
  static constexpr int fixed_bytes = q_region + (out_apart ? out_bytes : 0) + control_bytes;
  static constexpr int stages = max_int(2, min_int(4, (block_limit - fixed_bytes) / (k_bytes + v_bytes)));

  static constexpr int q_offset = 0;
  static constexpr int out_offset = out_apart ? q_region : 0;
  static constexpr int k_offset = q_region + (out_apart ? out_bytes : 0);
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

  // What the producer tells the consumers, behind the barriers.
  static constexpr int q_facts = ceil_div(v_empty + 8 * stages, 16) * 16;  ///< For this Q tile and the next.
  static constexpr int kv_facts = q_facts + 2 * gpu::q_facts_bytes;        ///< For each stage.
  static constexpr int sides = kv_facts + gpu::kv_facts_bytes * stages;    ///< The producer's own; see lane_tiles.h.
  static constexpr int mask_table = control_offset + facts_bytes;
  static_assert(sides + 16 * rank <= mask_table - Columns::parts * Columns::entry_bytes,
                "room for what the consumers are told");

  /// True if each warpgroup's rows are a box by themselves, which it stores without waiting for the others.
  static constexpr bool out_by_warpgroup =
      QTile::volume == rows && (warpgroups == 1 || warpgroup_rows % QTile::pitch(0) == 0);
  /// Queries along the outermost axis that one warpgroup stores.
  static constexpr int out_extent = out_by_warpgroup ? QTile::extent(0) / warpgroups : QTile::extent(0);

  /// Extents of what one copy loads of Q and stores of the output.
  static constexpr int q_box(int axis) { return QTile::extents[axis]; }
  static constexpr int out_box(int axis) { return axis == 0 ? out_extent : QTile::extents[axis]; }

  /// Registers per thread after launch, shared out of what it gave: 384 x 168, 512 x 128 or, of two blocks on a
  /// multiprocessor, 256 x 128. The producer gets 40 of them where it needs them, for the addresses of many copies, and
  /// where two consumers can spare them, whose scores, probabilities and output leave room.
  static constexpr bool many_copies = qk_chunks + v_chunks > 4;
  static constexpr bool spares_registers = columns / 2 + columns / 4 + value_head_dim / 2 <= 184;
  static constexpr int producer_registers = warpgroups == 3 ? 32 : many_copies || spares_registers ? 40 : 24;
  static constexpr int consumer_registers = warpgroups == 3   ? 160
                                            : warpgroups == 1 ? 256 - producer_registers
                                                              : 252 - producer_registers / 2;
  /// One consumer and one producer that have the multiprocessor for themselves may both have 255.
  static constexpr bool shares_registers = warpgroups > 1 || blocks_per_processor > 1;
  static_assert(warpgroups <= 3, "at most 192 query rows");
  static_assert(warpgroups < 3 || launch_registers <= 128, "no room for a product in the registers at launch");
};

}  // namespace gnaforge::sm90
