// What a thread block has of shared memory, and how tiles lie in it. Host and device.
#pragma once

namespace gnaforge::gpu {

constexpr int shared_memory_limit = 227 * 1024;  ///< Of one thread block.

/// A tile lies in chunks of channels, one tensor copy each: rows of 128 bytes, the span of the swizzle, whose pattern
/// repeats after 8 rows.
constexpr int row_bytes = 128;
constexpr int swizzle_bytes = 8 * row_bytes;

/// Channels of a chunk; `Element` is gpu::Element of the dtype.
template <class Element>
constexpr int chunk_channels = row_bytes / Element::bytes;

/// Slots through which a producer tells consumers of a Q tile and of a KV tile; see work.h.
constexpr int q_facts_bytes = 32;
constexpr int kv_facts_bytes = 16;

}  // namespace gnaforge::gpu
