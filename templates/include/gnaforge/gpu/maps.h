// Tensor maps of heads-last tensors, and what TMA asks of their layout. Host only.
//
// A map has five dims at most, innermost first: channels, heads, tokens (innermost axis first), batch. Rank 3 would
// need six. Where a head's channels fill whole copies and heads are adjacent, heads fold into the channels: both loads'
// zero fill and stores' clipping still end at the head. Elsewhere each batch entry of rank 3 has maps of its own, as in
// any rank where batch entries are one, which `expand` makes: whether maps may have a stride of 0 isn't documented.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

#include "gnaforge/entry.h"
#include "gnaforge/gpu/element.h"
#include "gnaforge/gpu/shared_memory.h"

namespace gnaforge::gpu {

/// Sizes of what one map shows: a dilation group of one batch entry or of all.
template <int Rank>
struct Extents {
  std::int64_t head_dim, heads, tokens[Rank], batch;
};

namespace check {

/// `size` is of the dim that `stride` belongs to, in elements of `bytes`: the stride of a dim of one element is never
/// used.
inline gnaforge_code stride(const char* tensor, const char* dim, std::int64_t size, std::int64_t stride, int bytes,
                            const Reason& reason) {
  if (size == 1) return GNAFORGE_OK;
  const std::int64_t multiple = 16 / bytes, limit = (std::int64_t{1} << 40) / bytes;
  if (stride <= 0 || stride % multiple != 0)
    return reason.refuse(GNAFORGE_NO_LAYOUT, "%s has stride %lld along its %s, must be a positive multiple of %lld",
                         tensor, static_cast<long long>(stride), dim, static_cast<long long>(multiple));
  if (stride >= limit)
    return reason.refuse(GNAFORGE_NO_LAYOUT, "%s has stride %lld along its %s, must be below %lld", tensor,
                         static_cast<long long>(stride), dim, static_cast<long long>(limit));
  return GNAFORGE_OK;
}

/// Every tensor that is copied by tensor maps, or stored 16 bytes at a time: those whose dtype is the kernel's.
inline gnaforge_code layout(const gnaforge_args& args, const Reason& reason) {
  static constexpr const char* axis_names[] = {"first token dim", "second token dim", "third token dim"};
  for (int role = 0; role < roles_end(args); ++role) {
    const gnaforge_tensor* const tensor = tensor_of(args, role);
    if (tensor == nullptr || role_facts[role].dtype != 0) continue;
    const char* const name = role_facts[role].name;
    const Sizes sizes = sizes_of(*args.problem, role);
    const int bytes = dtype_bytes(tensor->dtype);
    if (reinterpret_cast<std::uintptr_t>(tensor->data) % 16 != 0)
      return reason.refuse(GNAFORGE_NO_LAYOUT, "%s is not aligned to 16 bytes", name);
    if (tensor->batch_stride != 0)
      if (const gnaforge_code code = stride(name, "batch", sizes.batch, tensor->batch_stride, bytes, reason))
        return code;
    if (const gnaforge_code code = stride(name, "heads", sizes.heads, tensor->head_stride, bytes, reason)) return code;
    for (int d = 0; d < GNAFORGE_MAX_RANK; ++d)
      if (const gnaforge_code code =
              stride(name, axis_names[d], sizes.tokens[d], tensor->token_stride[d], bytes, reason))
        return code;
  }
  return GNAFORGE_OK;
}

}  // namespace check

/// Whether a tensor is one of Maps. Those of extra keys have maps of their own, of one token dim: there heads are
/// never folded, and batch entries that are one are a map of one.
inline bool is_mapped(int role) { return role_facts[role].dtype == 0 && role_facts[role].tokens != Tokens::extra; }

/// True if batch entries of a tensor of Maps are one.
inline bool repeats_batch(const gnaforge_args& args) {
  for (int role = 0; role < roles_end(args); ++role) {
    const gnaforge_tensor* const tensor = tensor_of(args, role);
    if (tensor != nullptr && is_mapped(role) && tensor->batch_stride == 0) return true;
  }
  return false;
}

/// True if the heads of every tensor of Maps can be folded into its channels.
template <class Element>
bool foldable(const gnaforge_args& args) {
  for (int role = 0; role < roles_end(args); ++role) {
    const gnaforge_tensor* const tensor = tensor_of(args, role);
    if (tensor == nullptr || !is_mapped(role)) continue;
    const Sizes sizes = sizes_of(*args.problem, role);
    if (sizes.channels % chunk_channels<Element> != 0 || (sizes.heads > 1 && tensor->head_stride != sizes.channels))
      return false;
  }
  return true;
}

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

/// The driver's cuTensorMapEncodeTiled, found at run time so that nothing links to libcuda; null if there is no driver.
inline EncodeTiled find_encode_tiled() {
  static std::atomic<void*> found{nullptr};
  void* function = found.load(std::memory_order_relaxed);
  if (function == nullptr) {
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) return nullptr;
    found.store(function, std::memory_order_relaxed);
  }
  return reinterpret_cast<EncodeTiled>(function);
}

/// A map before it is encoded. Dims are innermost first: channels, heads unless they are folded, tokens, batch.
struct MapShape {
  int role, rank;  ///< Rank 0: there is no such map.
  char* data;
  std::int64_t dims[5], strides[5];  ///< In bytes.
  int box[5];
  int head_axis;            ///< The dim that heads are in;
  std::int64_t head_unit;   ///< how much of it one head is,
  std::int64_t head_bytes;  ///< and how far it is to the next one.
};

/// The map of `tensor`, whose data begins at `data`, for boxes of `box` tokens of `heads` heads, of which a folded one
/// has one, and one chunk of channels.
template <class Element, int Rank>
MapShape map_shape(int role, const gnaforge_tensor& tensor, void* data, const Extents<Rank>& extents,
                   const std::int64_t (&token_stride)[Rank], const int (&box)[Rank], int heads, bool folded) {
  MapShape shape{};
  shape.role = role;
  shape.data = static_cast<char*>(data);
  shape.head_axis = folded ? 0 : 1;
  shape.head_unit = folded ? extents.head_dim : 1;
  shape.head_bytes = (folded ? extents.head_dim : tensor.head_stride) * Element::bytes;
  const auto add = [&](std::int64_t size, std::int64_t stride, int in_box) {
    shape.dims[shape.rank] = size;
    shape.strides[shape.rank] = stride * Element::bytes;
    shape.box[shape.rank++] = in_box;
  };
  add(folded ? extents.head_dim * extents.heads : extents.head_dim, 1, chunk_channels<Element>);
  if (!folded) add(extents.heads, tensor.head_stride, heads);
  for (int d = Rank - 1; d >= 0; --d) add(extents.tokens[d], token_stride[d], box[d]);
  if (Rank < 3 || folded) add(extents.batch, tensor.batch_stride, 1);
  return shape;
}

template <class Element>
CUresult encode_map(EncodeTiled encode, CUtensorMap& map, const MapShape& shape) {
  cuuint64_t dims[5], strides[5];
  cuuint32_t boxes[5];
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  for (int i = 0; i < shape.rank; ++i) {
    dims[i] = static_cast<cuuint64_t>(shape.dims[i]);
    boxes[i] = static_cast<cuuint32_t>(shape.box[i]);
    // Any valid number will do where a dim has one element.
    strides[i] = static_cast<cuuint64_t>(shape.dims[i] == 1 ? 16 : shape.strides[i]);
  }
  return encode(&map, Element::map_type, static_cast<cuuint32_t>(shape.rank), shape.data, dims, strides + 1, boxes,
                steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

}  // namespace gnaforge::gpu
