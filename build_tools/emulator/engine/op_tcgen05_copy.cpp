// PTX ISA: TensorCore 5th Generation Family Instructions: tcgen05.cp, copies from shared to tensor memory.
#include <cstring>
#include <memory>

#include "matrix_layout.h"
#include "opcodes.h"
#include "tensor_memory.h"

namespace gnaforge::emulator {
namespace {

struct ShapeFacts {
  const char *name, *multicast;
  uint32_t rows, bytes, copies;  // copies: how often each row arrives
};
// The last four lanes of each quarter (.4x256b) are left out: no kernel here refreshes them.
constexpr ShapeFacts kShapes[] = {{"128x256b", "", 128, 32, 1},
                                  {"128x128b", "", 128, 16, 1},
                                  {"64x128b", "warpx2::02_13", 64, 16, 2},
                                  {"64x128b", "warpx2::01_23", 64, 16, 2},
                                  {"32x128b", "warpx4", 32, 16, 4}};

/// The lane of the `copy`th arrival of a row: quarters of 32 lanes are named by the multicast.
uint32_t lane_of(const ShapeFacts& shape, uint32_t row, uint32_t copy) {
  bool neighbours = shape.multicast[shape.rows == 64 ? 9 : 0] == '1';  // 01_23
  return neighbours ? row / 32 * 64 + 32 * copy + row % 32 : row + shape.rows * copy;
}

/// Runs in the order of the tensor core's work, and is complete when a later tcgen05.commit has arrived.
Status copy(Warp& warp, const Instruction& in, uint32_t mask) {
  if (mask & (mask - 1))
    throw EmulationError("tcgen05.cp is issued by one thread, here by " + std::to_string(__builtin_popcount(mask)));
  Cta& cta = warp.cta;
  TensorMemory& memory = *cta.tensor_memory;
  const ShapeFacts& shape = kShapes[in.detail[0]];
  auto address = static_cast<uint32_t>(warp.address(in.args[0], warp.lane));
  if (address >> 16)
    throw EmulationError("tcgen05.cp to lane " + std::to_string(address >> 16) + " of tensor memory, expected 0");
  MatrixLayout layout = tcgen05_layout(warp.bits(in.args[1], warp.lane));
  TensorRegion region{0, kTensorLanes, address & 0xffff, shape.bytes / 4};
  Epoch user{++memory.issued, kTensorAgent};
  memory.begin_mma(region, true, warp.tensor_access(user));
  auto chunks = std::make_shared<std::vector<uint32_t>>();
  matrix_chunks(layout, 1, 0, shape.rows, shape.bytes, false, *chunks);
  auto thread = static_cast<uint16_t>(warp.thread(warp.lane));
  for (uint32_t chunk : *chunks)
    cta.shared.begin_async_read(chunk, kGranule, thread, Reader::mma, warp.clock, user,
                                [&](uint16_t of) { return cta.fences[of]; });
  TensorMemory::Issued& issued = memory.issued_by[thread];
  issued.last = memory.issued;
  issued.releases.push_back([&cta, &memory, chunks, region] {
    for (uint32_t chunk : *chunks) cta.shared.end_async_read(chunk, kGranule, Reader::mma);
    memory.end_mma(region);
  });
  memory.mark_written(region);
  cta.submit_ordered([&cta, &memory, &shape, layout, region] {
    for (uint32_t row = 0; row < shape.rows; ++row)
      for (uint32_t at = 0; at < shape.bytes; at += kGranule)
        for (uint32_t i = 0; i < shape.copies; ++i)
          std::memcpy(memory.row(lane_of(shape, row, i), region.column + at / 4),
                      cta.shared.data() + layout.k_major(row, at, 1), kGranule);
  });
  return Status::next;
}

void decode_copy(Instruction& in) {
  if (in.mode() != "cp") return;
  expect_count(in, 2, 2);
  size_t expected = 4;  // tcgen05, cp, cta_group, shape; then a multicast. Formats that unpack are left out.
  for (int i = 0; i < 5; ++i) {
    bool multicast = kShapes[i].multicast[0] != 0;
    if (!in.has(kShapes[i].name) || (multicast && !in.has(kShapes[i].multicast)) ||
        in.parts.size() != expected + multicast)
      continue;
    in.detail[0] = i;
    in.run = copy;
  }
}

}  // namespace

std::vector<Opcode> tcgen05_copy_opcodes() {
  return {{"tcgen05", "TensorCore 5th Generation Family Instructions: tcgen05.cp", decode_copy,
           "cp cta_group::1 128x256b 128x128b 64x128b 32x128b warpx2::02_13 warpx2::01_23 warpx4"}};
}

}  // namespace gnaforge::emulator
