// Tensor maps: what cuTensorMapEncodeTiled describes, with the rules that the driver documents.
#pragma once
#include <cstdint>
#include <functional>
#include <string>

#include "types.h"

namespace gnaforge::emulator {

constexpr int kMaxRank = 5;

struct TensorMap {
  uint32_t data_type = 0;  // CUtensorMapDataType
  uint32_t rank = 0;
  uint64_t address = 0;
  uint64_t dims[kMaxRank] = {};
  uint64_t strides[kMaxRank] = {};  // in bytes, of dimension i; strides[0] is the element's size
  uint32_t box[kMaxRank] = {};
  uint32_t element_strides[kMaxRank] = {};
  uint32_t interleave = 0, swizzle = 0, l2_promotion = 0, fill_nan = 0;

  uint32_t element_size() const;
  /// Elements that a copy moves along a dimension.
  uint32_t extent(int dimension) const {
    // Element strides don't apply to the innermost dimension without interleave.
    return dimension == 0 ? box[0] : (box[dimension] + element_strides[dimension] - 1) / element_strides[dimension];
  }
  uint32_t row_bytes() const { return box[0] * element_size(); }
  uint32_t rows() const;
  uint32_t box_bytes() const { return rows() * row_bytes(); }
  Type reduction_type() const;

  /// Calls f(row, global address of the row's first inside element, first inside element, how many are inside).
  void each_row(const int32_t* origin, const std::function<void(uint32_t, uint64_t, uint32_t, uint32_t)>& f) const;
  /// Where a byte of the box lies, given where it would lie without swizzle.
  uint32_t swizzled(uint32_t address) const;
};

constexpr uint32_t kTensorMapBytes = 128;

/// Arguments of cuTensorMapEncodeTiled to the opaque 128 bytes. Returns "" or the rule that is broken.
std::string encode_tensor_map(void* out, const TensorMap& map);
/// Throws if the bytes hold no tensor map.
TensorMap decode_tensor_map(const uint8_t* bytes);

}  // namespace gnaforge::emulator
