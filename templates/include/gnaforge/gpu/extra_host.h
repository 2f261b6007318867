// Extra keys of a call, for parameters and maps. Host only.
#pragma once

#include "gnaforge/gpu/maps.h"
#include "gnaforge/names.h"
#include "gnaforge/gpu/extra_keys.h"

namespace gnaforge::gpu {

constexpr int maps_of_extra = sizeof(ExtraMaps) / sizeof(CUtensorMap);

/// Of ExtraMaps, in their order: all batch entries of the call, in boxes of `columns` keys. Pieces that there aren't
/// have none. Returns whether there is any.
template <class Element>
bool shape_extra_keys(MapShape (&shapes)[maps_of_extra], const gnaforge_args& args, int columns) {
  bool any = false;
  for (int i = 0; i < maps_of_extra; ++i) {
    const int role = GNAFORGE_EXTRA_K + i;  // K of all pieces, then V
    const gnaforge_tensor* const tensor = tensor_of(args, role);
    if (tensor == nullptr) continue;
    const Sizes sizes = sizes_of(*args.problem, role);
    const std::int64_t batch = tensor->batch_stride == 0 ? 1 : sizes.batch;
    any = true;
    shapes[i] =
        map_shape<Element, 1>(role, *tensor, tensor->data, {sizes.channels, sizes.heads, {sizes.tokens[0]}, batch},
                              {tensor->token_stride[0]}, {columns}, 1, false);
  }
  return any;
}

inline ExtraKeys extra_keys_of(const gnaforge_args& args) {
  ExtraKeys keys{};
  for (int piece = 0; piece < GNAFORGE_MAX_EXTRA; ++piece) {
    if (args.problem->extra_tokens[piece] == 0) continue;
    keys.pieces = piece + 1;
    keys.tokens[piece] = static_cast<int>(args.problem->extra_tokens[piece]);
    if (const gnaforge_tensor* const lengths = tensor_of(args, GNAFORGE_EXTRA_LENGTHS + piece)) {
      keys.lengths[piece] = static_cast<const int*>(lengths->data);
      keys.lengths_stride[piece] = lengths->batch_stride;
    }
    if (tensor_of(args, GNAFORGE_EXTRA_K + piece)->batch_stride == 0) keys.repeated |= 1 << 2 * piece;
    if (tensor_of(args, GNAFORGE_EXTRA_V + piece)->batch_stride == 0) keys.repeated |= 2 << 2 * piece;
  }
  return keys;
}

}  // namespace gnaforge::gpu
