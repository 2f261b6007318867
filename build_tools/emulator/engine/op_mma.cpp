// PTX ISA: Warp Level Matrix Multiply-Accumulate Instructions: mma.sync, m16n8 with f16, bf16, tf32, e4m3 and e5m2.
#include <cstdio>
#include <cstring>

#include "formats.h"
#include "matrix_layout.h"
#include "opcodes.h"

namespace gnaforge::emulator {
namespace {

constexpr uint32_t kRows = 16, kColumns = 8, kMaxDepth = 32;

/// detail: 0 the depth, 1 the A type, 2 the B type, 3 bits: C is f16, D is f16.
constexpr int kHalfC = 1, kHalfD = 2;

/// Row and column of a lane's element i of C and D, f32 or f16.
void result_position(uint32_t lane, uint32_t i, uint32_t& row, uint32_t& column) {
  row = lane / 4 + 8 * (i / 2);
  column = 2 * (lane % 4) + i % 2;
}

Status multiply(Warp& warp, const Instruction& in, uint32_t mask) {
  if (mask != ~0u) {
    if (warp.alive != ~0u) throw EmulationError("mma.sync needs all 32 lanes of the warp");
    return Status::blocked;
  }
  auto depth = static_cast<uint32_t>(in.detail[0]);
  auto type_a = static_cast<Type>(in.detail[1]), type_b = static_cast<Type>(in.detail[2]);
  auto size = static_cast<uint32_t>(size_of(type_a)), per_register = 4 / size;
  float a[kRows * kMaxDepth], b[kMaxDepth * kColumns], c[kRows * kColumns];
  for (uint32_t q = 0; q < in.args[1].parts.size(); ++q) {
    const uint32_t* words = warp.in<uint32_t>(in.args[1].parts[q]);
    for (uint32_t lane = 0; lane < kWarpSize; ++lane)
      for (uint32_t i = 0; i < per_register; ++i)
        a[(lane / 4 + 8 * (q % 2)) * depth + (lane % 4 + 4 * (q / 2)) * per_register + i] =
            decode_element(type_a, reinterpret_cast<const uint8_t*>(&words[lane]) + i * size);
  }
  for (uint32_t q = 0; q < in.args[2].parts.size(); ++q) {
    const uint32_t* words = warp.in<uint32_t>(in.args[2].parts[q]);
    for (uint32_t lane = 0; lane < kWarpSize; ++lane)
      for (uint32_t i = 0; i < per_register; ++i)
        b[((lane % 4 + 4 * q) * per_register + i) * kColumns + lane / 4] =
            decode_element(type_b, reinterpret_cast<const uint8_t*>(&words[lane]) + i * size);
  }
  uint32_t row, column;
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t* words = warp.in<uint32_t>(in.args[3].parts[in.detail[3] & kHalfC ? i / 2 : i]);
    for (uint32_t lane = 0; lane < kWarpSize; ++lane) {
      result_position(lane, i, row, column);
      uint32_t word = words[lane];
      c[row * kColumns + column] =
          in.detail[3] & kHalfC ? from_f16(static_cast<uint16_t>(word >> (16 * (i % 2)))) : as_float(word);
    }
  }
  multiply_add(kRows, kColumns, depth, a, b, c);
  warp.cta.counters.mma_operations += 2ull * kRows * kColumns * depth;
  uint32_t results[4][kWarpSize];
  for (uint32_t i = 0; i < 4; ++i)
    for (uint32_t lane = 0; lane < kWarpSize; ++lane) {
      result_position(lane, i, row, column);
      float value = c[row * kColumns + column];
      if (!(in.detail[3] & kHalfD))
        results[i][lane] = as_bits(value);
      else if (i % 2 == 0)
        results[i / 2][lane] = to_f16(value);
      else
        results[i / 2][lane] |= uint32_t{to_f16(value)} << 16;
    }
  for (size_t q = 0; q < in.args[0].parts.size(); ++q) warp.put(in.args[0].parts[q], mask, results[q]);
  return Status::next;
}

void decode_mma(Instruction& in) {
  // mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
  if (in.parts.size() != 10 || in.parts[1] != "sync" || in.parts[4] != "row" || in.parts[5] != "col") return;
  int rows, columns, depth;
  if (std::sscanf(in.parts[3].c_str(), "m%dn%dk%d", &rows, &columns, &depth) != 3 || rows != 16 || columns != 8) return;
  Type d = type_named(in.parts[6]), a = type_named(in.parts[7]), b = type_named(in.parts[8]),
       c = type_named(in.parts[9]);
  int bytes = depth * size_of(a);
  bool eights = a == Type::e4m3 || a == Type::e5m2;
  bool known = eights
                   ? (b == Type::e4m3 || b == Type::e5m2) && bytes == 32
                   : a == b && (a == Type::f16 || a == Type::bf16 || a == Type::tf32) && (bytes == 16 || bytes == 32);
  bool results =
      (d == Type::f32 && c == Type::f32) ||
      ((a == Type::f16 || eights) && (d == Type::f32 || d == Type::f16) && (c == Type::f32 || c == Type::f16));
  if (!known || !results) return;
  expect_count(in, 4, 4);
  auto count = [&](size_t operand, size_t expected) {
    if (in.args[operand].parts.size() != expected)
      throw EmulationError("operand " + std::to_string(operand + 1) + " has " +
                           std::to_string(in.args[operand].parts.size()) + " registers, expected " +
                           std::to_string(expected));
  };
  count(0, d == Type::f16 ? 2 : 4);
  count(1, static_cast<size_t>(bytes / 8));
  count(2, static_cast<size_t>(bytes / 16));
  count(3, c == Type::f16 ? 2 : 4);
  in.detail[0] = depth;
  in.detail[1] = static_cast<int>(a);
  in.detail[2] = static_cast<int>(b);
  in.detail[3] = (c == Type::f16 ? kHalfC : 0) | (d == Type::f16 ? kHalfD : 0);
  in.run = multiply;
}

}  // namespace

std::vector<Opcode> mma_opcodes() {
  return {{"mma", "Warp Level Matrix Instructions: mma", decode_mma,
           "sync aligned row col m16n8k4 m16n8k8 m16n8k16 m16n8k32"}};
}

}  // namespace gnaforge::emulator
