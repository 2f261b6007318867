// The gradients of extra keys, of what parts of the queries gave. A kernel of its own, which adds up in the order of
// the parts: so bits don't depend on how many multiprocessors there are. Device only.
#pragma once

#include "gnaforge/gpu/element.h"
#include "gnaforge/sm90/backward/delta.h"
#include "gnaforge/sm90/backward/params.h"
#include "gnaforge/sm90/extra_loads.h"

namespace gnaforge::sm90::backward {

__device__ __forceinline__ void add(float4& sum, float4 other) {
  sum.x += other.x;
  sum.y += other.y;
  sum.z += other.z;
  sum.w += other.w;
}

template <class Element>
__device__ __forceinline__ float4 unpack(std::uint32_t a, std::uint32_t b) {
  const float2 x = Element::unpack(a), y = Element::unpack(b);
  return {x.x, x.y, y.x, y.y};
}

/// Tiles of `Keys` keys; `HeadDim` and `ValueHeadDim` channels. Each warp takes keys of one head along x, and heads of
/// all batch entries along y; z is the piece. Keys that don't count have gradients of zero.
template <class Element, int Keys, int HeadDim, int ValueHeadDim>
__device__ __forceinline__ void add_up_sums(const SumParams& params) {
  constexpr int channels = HeadDim + ValueHeadDim, width = 8;  // channels of a lane
  const int piece = static_cast<int>(blockIdx.z), tokens = params.keys.tokens[piece];
  const int parts = params.work.parts.value, tiles = params.work.tiles.value;
  for (int row = blockIdx.y; row < params.batch * params.kv_heads.value; row += gridDim.y) {
    int batch = row;
    const int head = params.kv_heads.split(batch), length = extra_length(params.keys, piece, batch);
    for (int key = blockIdx.x * sum_warps + static_cast<int>(threadIdx.x) / 32; key < tokens;
         key += gridDim.x * sum_warps) {
      const std::int64_t tile = std::int64_t{row} * parts * tiles + (piece ? params.work.second : 0) + key / Keys;
      const float* const first = params.work.sums + (tile * Keys + key % Keys) * channels;
      for (int c = width * (static_cast<int>(threadIdx.x) % 32); c < channels; c += width * 32) {
        float4 low{0, 0, 0, 0}, high{0, 0, 0, 0};
#pragma unroll 1
        for (int part = 0; key < length && part < parts; ++part) {
          const auto* const own =
              reinterpret_cast<const float4*>(first + std::int64_t{part} * tiles * Keys * channels + c);
          add(low, own[0]);
          add(high, own[1]);
        }
        const bool of_values = c >= HeadDim;
        const SumParams::View& grad = params.grad[piece][of_values];
        const std::int64_t at = batch * grad.batch_stride + head * grad.head_stride + key * grad.token_stride +
                                (of_values ? c - HeadDim : c);
        auto* const to = reinterpret_cast<uint4*>(static_cast<char*>(grad.data) + at * Element::bytes);
        if (params.accumulates >> (2 * piece + of_values) & 1) {
          const uint4 held = *to;
          add(low, unpack<Element>(held.x, held.y));
          add(high, unpack<Element>(held.z, held.w));
        }
        *to = {Element::pack(low.x, low.y), Element::pack(low.z, low.w), Element::pack(high.x, high.y),
               Element::pack(high.z, high.w)};
      }
    }
  }
}

}  // namespace gnaforge::sm90::backward
