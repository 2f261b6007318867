// Extra keys: up to two further pieces of keys that all queries see. Host and device.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "gnaforge/abi.h"

namespace gnaforge::sm90 {

/// By which pieces are read, whose tokens are one dim whatever the rank: boxes are a KV tile's columns, and lie in
/// shared memory as those of a KV tile do.
struct ExtraMaps {
  CUtensorMap k[GNAFORGE_MAX_EXTRA], v[GNAFORGE_MAX_EXTRA];
};

/// What a kernel needs to know of a call's pieces beside their maps.
struct ExtraKeys {
  int pieces;    ///< Up to the last one that has any keys.
  int repeated;  ///< Bits 2p and 2p + 1: batch entries of K and V of piece p are one.
  int tokens[GNAFORGE_MAX_EXTRA];
  const int* lengths[GNAFORGE_MAX_EXTRA];  ///< Of batch entries, on the device; null: all tokens count.
  std::int64_t lengths_stride[GNAFORGE_MAX_EXTRA];
};

}  // namespace gnaforge::sm90
