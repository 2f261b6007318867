// Where a matrix's elements lie in shared memory, as a wgmma or tcgen05 descriptor says.
#pragma once
#include <cstdint>
#include <vector>

#include "types.h"

namespace gnaforge::emulator {

/// A matrix descriptor's fields, in bytes.
struct MatrixLayout {
  uint32_t start = 0, leading = 0, stride = 0;
  uint32_t swizzle_bits = 0;  // 0: none, 1..3: spans of 32, 64, 128 bytes
  bool wide_atoms = false;    // 128 bytes in atoms of 32

  uint32_t swizzled(uint32_t a) const {
    if (wide_atoms) return a ^ ((a >> 7 & 3) << 5);
    return swizzle_bits == 0 ? a : a ^ ((a >> 7 & ((1u << swizzle_bits) - 1)) << 4);
  }
  /// Address of element (row, k) where k is contiguous. Rows come in groups of 8.
  uint32_t k_major(uint32_t row, uint32_t k, uint32_t element) const {
    uint32_t byte = k * element;
    if (swizzle_bits == 0) return start + row / 8 * stride + byte / 16 * leading + row % 8 * 16 + byte % 16;
    return swizzled(start + row / 8 * stride + row % 8 * (16u << swizzle_bits) + byte);
  }
  /// Address of element (row, k) where rows are contiguous. k comes in groups of 8, of 4 with wide atoms.
  uint32_t row_major(uint32_t row, uint32_t k, uint32_t element) const {
    uint32_t byte = row * element, span = 16u << swizzle_bits;
    if (swizzle_bits == 0) return start + byte / 16 * stride + k / 8 * leading + k % 8 * 16 + byte % 16;
    uint32_t group = wide_atoms ? 4 : 8;
    return swizzled(start + byte / span * leading + k / group * stride + k % group * span + byte % span);
  }
};

/// The layout that a tcgen05 shared memory descriptor names.
MatrixLayout tcgen05_layout(uint64_t descriptor);

/// Decodes elements of a matrix operand to f32.
float decode_element(Type type, const uint8_t* bytes);

/// Reads rows [first, first + count) x depth of a matrix into `out`, as out[k * pitch + row] or out[row * pitch + k].
void read_matrix(const uint8_t* shared, const MatrixLayout& layout, Type type, uint32_t first, uint32_t count,
                 uint32_t depth, bool rows_contiguous, bool out_by_k, uint32_t pitch, float* out);

/// The 16-byte pieces that those rows take.
void matrix_chunks(const MatrixLayout& layout, uint32_t element, uint32_t first, uint32_t count, uint32_t depth,
                   bool rows_contiguous, std::vector<uint32_t>& out);

/// c[row][n] (pitch columns) += a[row][k] * b[k][n], in f32.
void multiply_add(uint32_t rows, uint32_t columns, uint32_t depth, const float* a, const float* b, float* c);

}  // namespace gnaforge::emulator
