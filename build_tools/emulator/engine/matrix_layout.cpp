#include "matrix_layout.h"

#include <array>
#include <cstring>

#include "formats.h"

namespace gnaforge::emulator {

namespace {
std::array<float, 256> table_of(float (*decode)(uint8_t)) {
  std::array<float, 256> table{};
  for (int i = 0; i < 256; ++i) table[static_cast<size_t>(i)] = decode(static_cast<uint8_t>(i));
  return table;
}
const std::vector<float>& half_table() {
  static const std::vector<float> table = [] {
    std::vector<float> values(65536);
    for (uint32_t i = 0; i < 65536; ++i) values[i] = from_f16(static_cast<uint16_t>(i));
    return values;
  }();
  return table;
}
}  // namespace

namespace {

uint16_t two_bytes(const uint8_t* bytes) {
  uint16_t value;
  std::memcpy(&value, bytes, 2);
  return value;
}

/// Calls f(bytes of one element, decoder), so that each type gets a loop of its own.
template <class F>
auto with_decoder(Type type, F&& f) {
  static const std::array<float, 256> e4m3 = table_of(from_e4m3), e5m2 = table_of(from_e5m2);
  static const std::vector<float>& half = half_table();
  switch (type) {
    case Type::bf16: return f([](const uint8_t* bytes) { return from_bf16(two_bytes(bytes)); });
    case Type::f16: return f([](const uint8_t* bytes) { return half[two_bytes(bytes)]; });
    case Type::e4m3: return f([](const uint8_t* bytes) { return e4m3[*bytes]; });
    case Type::e5m2: return f([](const uint8_t* bytes) { return e5m2[*bytes]; });
    default:  // tf32: the low 13 bits are not used
      return f([](const uint8_t* bytes) {
        uint32_t four;
        std::memcpy(&four, bytes, 4);
        return as_float(four & ~0x1fffu);
      });
  }
}

}  // namespace

MatrixLayout tcgen05_layout(uint64_t descriptor) {
  uint32_t bits;
  switch (descriptor >> 61) {
    case 0: bits = 0; break;
    case 1:
    case 2: bits = 3; break;
    case 4: bits = 2; break;
    case 6: bits = 1; break;
    default: throw EmulationError("tcgen05 descriptor " + hex(descriptor) + " has a layout that does not exist");
  }
  if ((descriptor >> 46 & 3) != 1)
    throw EmulationError("tcgen05 descriptor " + hex(descriptor) + " has version " +
                         std::to_string(descriptor >> 46 & 3) + ", expected 1");
  if (descriptor >> 49 & 15)
    throw EmulationError("tcgen05 descriptor " + hex(descriptor) +
                         " has a base offset or an absolute leading dimension");
  return {static_cast<uint32_t>(descriptor & 0x3fff) << 4, static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4,
          static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4, bits, descriptor >> 61 == 1};
}

float decode_element(Type type, const uint8_t* bytes) {
  return with_decoder(type, [&](auto decode) { return decode(bytes); });
}

void read_matrix(const uint8_t* shared, const MatrixLayout& layout, Type type, uint32_t first, uint32_t count,
                 uint32_t depth, bool rows_contiguous, bool out_by_k, uint32_t pitch, float* out) {
  auto element = static_cast<uint32_t>(size_of(type));
  uint32_t step = 16 / element;  // elements in a contiguous piece
  uint32_t row_pitch = out_by_k ? 1 : pitch, k_pitch = out_by_k ? pitch : 1;
  with_decoder(type, [&](auto decode) {
    if (rows_contiguous) {
      for (uint32_t k = 0; k < depth; ++k)
        for (uint32_t row = 0; row < count; row += step) {
          const uint8_t* at = shared + layout.row_major(first + row, k, element);
          float* to = out + row * row_pitch + k * k_pitch;
          for (uint32_t i = 0; i < step && row + i < count; ++i) to[i * row_pitch] = decode(at + i * element);
        }
    } else {
      for (uint32_t row = 0; row < count; ++row)
        for (uint32_t k = 0; k < depth; k += step) {
          const uint8_t* at = shared + layout.k_major(first + row, k, element);
          float* to = out + row * row_pitch + k * k_pitch;
          for (uint32_t i = 0; i < step; ++i) to[i * k_pitch] = decode(at + i * element);
        }
    }
  });
}

void matrix_chunks(const MatrixLayout& layout, uint32_t element, uint32_t first, uint32_t count, uint32_t depth,
                   bool rows_contiguous, std::vector<uint32_t>& out) {
  uint32_t step = 16 / element;
  if (rows_contiguous) {
    for (uint32_t k = 0; k < depth; ++k)
      for (uint32_t row = 0; row < count; row += step) out.push_back(layout.row_major(first + row, k, element) & ~15u);
  } else {
    for (uint32_t row = 0; row < count; ++row)
      for (uint32_t k = 0; k < depth; k += step) out.push_back(layout.k_major(first + row, k, element) & ~15u);
  }
}

void multiply_add(uint32_t rows, uint32_t columns, uint32_t depth, const float* a, const float* b, float* c) {
  for (uint32_t row = 0; row < rows; ++row) {
    float* to = c + row * columns;
    for (uint32_t k = 0; k < depth; ++k) {
      float x = a[row * depth + k];
      const float* from = b + k * columns;
      for (uint32_t n = 0; n < columns; ++n) to[n] += x * from[n];
    }
  }
}

}  // namespace gnaforge::emulator
