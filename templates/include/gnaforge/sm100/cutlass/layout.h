// What of a kernel of the variant `cutlass` follows from its config. Host and device.
#pragma once

#include "gnaforge/abi.h"
#include "gnaforge/gna/source.h"
#include "gnaforge/gpu/element.h"
#include "gnaforge/gpu/half_tile.h"
#include "gnaforge/gpu/shared_memory.h"

namespace gnaforge::sm100_cutlass {

using gpu::halves;
using gpu::row_bytes;

/// The tile of CUTLASS's example 77, which is fixed: two halves of query rows, which share the keys.
constexpr int half_rows = 128;
constexpr int columns = 128;
constexpr int kv_stages = 3;

template <class QTile>
using HalfTile = gpu::HalfTile<QTile, half_rows>;

/// Which KV tiles the kernel visits; see gna/source.h.
template <class Config>
using TileSource = WindowTiles<typename Config::QTile, typename Config::KvTile>;

/// `Config` is as in entry.h; what the host part wants to know is named in gpu/host.h.
template <class Config>
struct Layout {
  using QTile = typename Config::QTile;
  using KvTile = typename Config::KvTile;
  using Half = HalfTile<QTile>;
  static constexpr int rank = QTile::rank;
  using Element = gpu::Element<Config::dtype>;
  static_assert(Config::out_dtype == Config::dtype, "the output has the inputs' dtype");
  static constexpr int head_dim = Config::head_dim;
  static constexpr int value_head_dim = Config::value_head_dim != 0 ? Config::value_head_dim : Config::head_dim;

  static constexpr int max_tiles = (1 << 23) - 1;  ///< Rows of all tiles are counted in an int.

  static constexpr int rows = halves * half_rows;
  static constexpr int columns = sm100_cutlass::columns;
  static_assert(KvTile::volume <= columns, "a KV tile has at most 128 keys");

  static constexpr int chunk_channels = gpu::chunk_channels<Element>;
  /// Channels of the MMAs. What a head lacks is read as zero, beyond the end of a tensor map's channels.
  static constexpr int channels =
      max_int(head_dim, value_head_dim) <= chunk_channels ? chunk_channels : 2 * chunk_channels;
  static_assert(max_int(head_dim, value_head_dim) <= channels, "at most 128 channels");
  static constexpr int chunks = channels / chunk_channels;
  static constexpr int v_chunks = ceil_div(value_head_dim, chunk_channels);
  static constexpr bool begins_early = false;  ///< CUTLASS's kernel doesn't wait.
  /// In folded maps the channels after a head's last are the next head's.
  static constexpr bool may_fold = head_dim == channels && value_head_dim == channels;

  static constexpr int q_box(int axis) { return Half::extent(axis); }
  static constexpr int out_box(int axis) { return Half::extent(axis); }

  // Shared memory: first CUTLASS's structs, which hold Q, a ring of stages of K or V, output and barriers.
  static constexpr int half_bytes = half_rows * channels * Element::bytes;
  static constexpr int stage_bytes = columns * channels * Element::bytes;
  static constexpr int q_offset = 0;
  static constexpr int kv_offset = halves * half_bytes;
  static constexpr int out_offset = kv_offset + kv_stages * stage_bytes;
  static constexpr int barrier_bytes = 1024;
  static constexpr int softmax_warps = 8;
  static constexpr int state_offset = out_offset + halves * half_bytes + barrier_bytes;
  static constexpr int state_bytes = 1024;  ///< Of the masks; see cutlass/mask.h.
  static constexpr int shared_bytes = state_offset + state_bytes;
  static_assert(shared_bytes <= gpu::shared_memory_limit, "the tiles fit shared memory");

  static constexpr int threads = 512;
  static constexpr int blocks_per_processor = 1;
};

}  // namespace gnaforge::sm100_cutlass
