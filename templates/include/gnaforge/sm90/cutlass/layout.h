// What of a kernel of sm90's variant `cutlass` follows from its config. Host and device.
#pragma once

#include "gnaforge/abi.h"
#include "gnaforge/gna/source.h"
#include "gnaforge/gpu/element.h"
#include "gnaforge/gpu/half_tile.h"
#include "gnaforge/gpu/shared_memory.h"
#include "gnaforge/sm90/forward/quad_columns.h"

namespace gnaforge::sm90_cutlass {

using gpu::halves;
using gpu::row_bytes;

/// Rows of one warpgroup of CUTLASS's example 88; two of them compute, a half of the Q tile each.
constexpr int half_rows = 64;
constexpr int warpgroup_threads = 128;

/// Which KV tiles the kernel visits; see gna/source.h.
template <class Config>
using TileSource = WindowTiles<typename Config::QTile, typename Config::KvTile>;

/// What warps that load note for others in shared memory; see kernel.h. Slots are four: those who note are at most two
/// Q tiles, or three KV tiles, ahead of who still reads.
constexpr int slots = 4;
template <class Source>
struct alignas(16) Notes {
  struct QTile {
    alignas(16) int facts[4 * 2];  ///< gpu::QTileFacts
    alignas(16) int more[4];       ///< KV head, interior tiles
    typename Source::List list;
    typename Source::Walk walk;
  } q_tile[slots];
  alignas(16) int kv_facts[slots][4];  ///< gpu::KvTileFacts
  alignas(16) unsigned char mask_table[max_int(16, sm90::QuadColumns<typename Source::KvTile>::table_bytes)];
};

/// `Config` is as in entry.h; what the host part wants to know is named in gpu/host.h.
template <class Config>
struct Layout {
  using QTile = typename Config::QTile;
  using KvTile = typename Config::KvTile;
  using Half = gpu::HalfTile<QTile, half_rows>;
  static constexpr int rank = QTile::rank;
  using Element = gpu::Element<Config::dtype>;
  static_assert(Config::out_dtype == Config::dtype, "the output has the inputs' dtype");
  static constexpr int head_dim = Config::head_dim;
  static constexpr int value_head_dim = Config::value_head_dim != 0 ? Config::value_head_dim : Config::head_dim;

  static constexpr int max_tiles = (1 << 30) - 1;  ///< Q tiles of one launch.

  static constexpr int rows = halves * half_rows;
  static constexpr int columns = KvTile::volume;
  static_assert(columns % 16 == 0 && columns <= 192, "P is taken 16 columns at a time, and has registers for 192");

  static constexpr int chunk_channels = gpu::chunk_channels<Element>;
  /// Channels of both products. What a head lacks is read as zero, beyond the end of a tensor map's channels.
  static constexpr int chunks = ceil_div(max_int(head_dim, value_head_dim), chunk_channels);
  static constexpr int channels = chunks * chunk_channels;
  static_assert(channels <= 256, "one wgmma has at most 256 channels of V");
  static constexpr int v_chunks = ceil_div(value_head_dim, chunk_channels);
  /// In folded maps the channels after a head's last are the next head's.
  static constexpr bool may_fold = head_dim == channels && value_head_dim == channels;

  static constexpr int q_box(int axis) { return Half::extent(axis); }
  static constexpr int out_box(int axis) { return Half::extent(axis); }

  // Shared memory, as example 88's kernel lays it: Q, a ring of stages of K or V, our notes, output, barriers.
  static constexpr int half_bytes = half_rows * channels * Element::bytes;
  static constexpr int stage_bytes = columns * channels * Element::bytes;
  static constexpr int notes_bytes = ceil_div(static_cast<int>(sizeof(Notes<TileSource<Config>>)), 1024) * 1024;
  static constexpr int barrier_bytes = 1024;
  static constexpr int fixed_bytes = 2 * halves * half_bytes + notes_bytes + barrier_bytes;
  static constexpr int stages = min_int(5, (gpu::shared_memory_limit - fixed_bytes) / stage_bytes);
  static_assert(stages >= 2, "the tiles fit shared memory");
  static constexpr int shared_bytes = fixed_bytes + stages * stage_bytes;

  static constexpr bool begins_early = false;  ///< CUTLASS's kernel doesn't wait.

  static constexpr int threads = (1 + halves) * warpgroup_threads;
  static constexpr int blocks_per_processor = 1;
};

}  // namespace gnaforge::sm90_cutlass
