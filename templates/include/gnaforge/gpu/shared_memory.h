// What a thread block has of shared memory, and how tiles lie in it. Host and device.
#pragma once

namespace gnaforge::gpu {

constexpr int shared_memory_limit = 227 * 1024;  ///< Of one thread block.

/// Channels of one tensor copy: a row of 128 bytes, the span of the swizzle.
constexpr int chunk_channels = 64;
constexpr int row_bytes = 128;

/// Slots through which a producer tells consumers of a Q tile and of a KV tile; see work.h.
constexpr int q_facts_bytes = 32;
constexpr int kv_facts_bytes = 16;

}  // namespace gnaforge::gpu
