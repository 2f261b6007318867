// What a thread block has of shared memory, and how tiles lie in it. Host and device.
#pragma once

namespace gnaforge::gpu {

constexpr int shared_memory_limit = 227 * 1024;  ///< Of one thread block.

/// Channels of one tensor copy: a row of 128 bytes, the span of the swizzle.
constexpr int chunk_channels = 64;
constexpr int row_bytes = 128;

}  // namespace gnaforge::gpu
