// PTX ISA: TensorCore 5th Generation Family Instructions (tcgen05), for one CTA.
#include <algorithm>
#include <array>
#include <cstring>
#include <memory>

#include "formats.h"
#include "matrix.h"
#include "matrix_layout.h"
#include "opcodes.h"
#include "tensor_memory.h"

namespace gnaforge::emulator {
namespace {

bool whole_warp(Warp& warp, uint32_t mask) { return (mask & warp.alive) == warp.alive; }

// --- allocation

Status allocate(Warp& warp, const Instruction& in, uint32_t mask) {
  if (!whole_warp(warp, mask)) return Status::blocked;
  Cta& cta = warp.cta;
  uint32_t columns = warp.uniform(in.args[1], mask, "the number of columns"), address = 0;
  uint32_t to = cta.shared_address(in.space, warp.address(in.args[0], warp.lane));
  if (to % 4) throw EmulationError("tcgen05.alloc to the unaligned address " + hex(to));
  cta.shared.check_bounds(to, 4, "tcgen05.alloc");
  if (!cta.tensor_memory->allocate(columns, address, cta.place(cta.origin()))) return Status::blocked;
  std::memcpy(cta.shared.write(to, 4, 0, static_cast<uint16_t>(warp.thread(0)), warp.clock, warp.epoch()), &address, 4);
  return Status::next;
}

Status deallocate(Warp& warp, const Instruction& in, uint32_t mask) {
  if (!whole_warp(warp, mask)) return Status::blocked;
  Cta& cta = warp.cta;
  uint32_t address = warp.uniform(in.args[0], mask, "the address"),
           columns = warp.uniform(in.args[1], mask, "the number of columns");
  cta.tensor_memory->deallocate(address, columns, cta.launch.options.relaxed_tensor_frees, warp.clock, warp.epoch());
  cta.event();
  return Status::next;
}

Status relinquish(Warp& warp, const Instruction&, uint32_t mask) {
  if (!whole_warp(warp, mask)) return Status::blocked;
  warp.cta.tensor_memory->relinquish();
  return Status::next;
}

// --- ld, st

enum Shape { k32x32, k16x64, k16x128, k16x256, k16x32x2 };
struct ShapeFacts {
  const char* name;
  uint32_t lanes, columns, registers;  // of .x1
};
constexpr ShapeFacts kShapes[] = {
    {"32x32b", 32, 1, 1}, {"16x64b", 16, 2, 1}, {"16x128b", 16, 4, 2}, {"16x256b", 16, 8, 4}, {"16x32bx2", 16, 1, 1}};

/// Where a lane's register r lies, from the region's first lane and column. In 16x32bx2, lanes 16 and up have a region
/// of their own.
void position(int shape, uint32_t lane, uint32_t r, uint32_t& row, uint32_t& column) {
  switch (shape) {
    case k32x32:
      row = lane;
      column = r;
      break;
    case k16x64:
      row = lane / 4 + 8 * (lane % 2);
      column = lane / 2 % 2 + 2 * r;
      break;
    case k16x32x2:
      row = lane % 16;
      column = r;
      break;
    case k16x128:
      row = lane / 4 + 8 * (r % 2);
      column = lane % 4 + 4 * (r / 2);
      break;
    default:
      row = lane / 4 + 8 * (r / 2 % 2);
      column = r % 2 + 2 * (lane % 4) + 8 * (r / 4);
      break;
  }
}

/// What a tcgen05.ld or st touches: one rectangle, or two in 16x32bx2.
struct Regions {
  TensorRegion parts[2];
  uint32_t count;
};

/// detail: 0 the shape, 1 the repetitions, 2 whether 16-bit halves of two columns share a register, 3 the split's
/// operand.
Regions regions_of(Warp& warp, const Instruction& in, const Operand& op) {
  auto address = static_cast<uint32_t>(warp.address(op, 0));
  for (int lane = 1; lane < kWarpSize; ++lane)
    if (static_cast<uint32_t>(warp.address(op, lane)) != address)
      throw EmulationError("the tensor memory address differs between lanes");
  const ShapeFacts& shape = kShapes[in.detail[0]];
  uint32_t columns = shape.columns * static_cast<uint32_t>(in.detail[1]) * (in.detail[2] ? 2 : 1);
  TensorRegion region{address >> 16, shape.lanes, address & 0xffff, columns};
  uint32_t own = 32u * (static_cast<uint32_t>(warp.index) % 4);
  if (region.lane < own || region.lane + region.lanes > own + 32)
    throw EmulationError("warp " + std::to_string(warp.index) + " may access lanes " + std::to_string(own) + ".." +
                         std::to_string(own + 31) + " of tensor memory, not " + std::to_string(region.lane) + ".." +
                         std::to_string(region.lane + region.lanes - 1));
  if (in.detail[0] != k16x32x2) return {{region, {}}, 1};
  TensorRegion second = region;
  second.column += static_cast<uint32_t>(in.args[static_cast<size_t>(in.detail[3])].value);
  return {{region, second}, 2};
}

/// Calls f(cell, lane) for the cells of register r: `part` 1 for the second column where two share a register.
template <class F>
void each_cell(const Instruction& in, const Regions& regions, TensorMemory& memory, uint32_t r, uint32_t part, F&& f) {
  for (uint32_t lane = 0; lane < kWarpSize; ++lane) {
    uint32_t row, column;
    position(in.detail[0], lane, r, row, column);
    const TensorRegion& region = regions.parts[regions.count == 2 ? lane / 16 : 0];
    f(memory.row(region.lane + row, region.column + (in.detail[2] ? 2 * column + part : column)), lane);
  }
}

Status load(Warp& warp, const Instruction& in, uint32_t mask) {
  if (mask != ~0u) {
    if (warp.alive != ~0u) throw EmulationError("tcgen05.ld needs all 32 lanes");
    return Status::blocked;
  }
  TensorMemory& memory = *warp.cta.tensor_memory;
  Regions regions = regions_of(warp, in, in.args[1]);
  bool relaxed = warp.cta.launch.options.relaxed_tensor_waits;
  for (uint32_t i = 0; i < regions.count; ++i) memory.begin_load(regions.parts[i], warp.tensor_access());
  const std::vector<Operand>& registers = in.args[0].parts;
  for (uint32_t r = 0; r < registers.size(); ++r) {
    uint32_t values[kWarpSize];
    each_cell(in, regions, memory, r, 0,
              [&](const float* cell, uint32_t lane) { std::memcpy(&values[lane], cell, 4); });
    if (in.detail[2])
      each_cell(in, regions, memory, r, 1, [&](const float* cell, uint32_t lane) {
        uint32_t second;
        std::memcpy(&second, cell, 4);
        values[lane] = (values[lane] & 0xffff) | second << 16;
      });
    warp.put(registers[r], mask, values);
    if (registers[r].is_register() && !relaxed) {
      ++warp.matrix->in_flight[registers[r].reg_index];
      ++warp.matrix->busy;
      warp.matrix->loading.push_back(registers[r].reg_index);
    }
  }
  warp.matrix->last = &in;
  for (uint32_t i = 0; i < regions.count; ++i) {
    if (relaxed)
      memory.end_load(regions.parts[i]);
    else
      warp.matrix->loads.push_back(regions.parts[i]);
  }
  return Status::next;
}

Status store(Warp& warp, const Instruction& in, uint32_t mask) {
  if (mask != ~0u) {
    if (warp.alive != ~0u) throw EmulationError("tcgen05.st needs all 32 lanes");
    return Status::blocked;
  }
  TensorMemory& memory = *warp.cta.tensor_memory;
  Regions regions = regions_of(warp, in, in.args[0]);
  for (uint32_t i = 0; i < regions.count; ++i) memory.begin_store(regions.parts[i], warp.tensor_access());
  const std::vector<Operand>& registers = in.args.back().parts;
  for (uint32_t r = 0; r < registers.size(); ++r) {
    const uint32_t* values = warp.in<uint32_t>(registers[r]);
    for (uint32_t part = 0; part < (in.detail[2] ? 2 : 1); ++part)
      each_cell(in, regions, memory, r, part, [&](float* cell, uint32_t lane) {
        uint32_t value = in.detail[2] ? values[lane] >> (16 * part) & 0xffff : values[lane];
        std::memcpy(cell, &value, 4);
      });
  }
  for (uint32_t i = 0; i < regions.count; ++i) {
    memory.mark_written(regions.parts[i]);
    if (warp.cta.launch.options.relaxed_tensor_waits)
      memory.end_store(regions.parts[i]);
    else
      warp.matrix->stores.push_back(regions.parts[i]);
  }
  return Status::next;
}

Status wait_loads(Warp& warp, const Instruction&, uint32_t mask) {
  if (!whole_warp(warp, mask)) return Status::blocked;
  MatrixState& state = *warp.matrix;
  for (uint32_t reg : state.loading) {
    --state.in_flight[reg];
    --state.busy;
  }
  for (const TensorRegion& region : state.loads) warp.cta.tensor_memory->wait_load(region, warp.tensor_access());
  state.loading.clear();
  state.loads.clear();
  return Status::next;
}

Status wait_stores(Warp& warp, const Instruction&, uint32_t mask) {
  if (!whole_warp(warp, mask)) return Status::blocked;
  for (const TensorRegion& region : warp.matrix->stores)
    warp.cta.tensor_memory->wait_store(region, warp.tensor_access());
  warp.matrix->stores.clear();
  return Status::next;
}

// --- mma

struct Mma {
  Type a, b;
  uint32_t rows, columns, depth;
  bool negate_a, negate_b, transpose_a, transpose_b, half;  // half: D is f16, in the lower half of each cell
};

/// detail[0]: 0 f16, 1 tf32, 2 f8f6f4.
Mma decode_instruction_descriptor(uint32_t d, int kind) {
  static constexpr Type kTypes[3][3] = {
      {Type::f16, Type::bf16, Type::none}, {Type::none, Type::none, Type::tf32}, {Type::e4m3, Type::e5m2, Type::none}};
  uint32_t a = d >> 7 & 7, b = d >> 10 & 7;
  Mma mma{a < 3 ? kTypes[kind][a] : Type::none,
          b < 3 ? kTypes[kind][b] : Type::none,
          (d >> 24 & 31) << 4,
          (d >> 17 & 63) << 3,
          0,
          (d >> 13 & 1) != 0,
          (d >> 14 & 1) != 0,
          (d >> 15 & 1) != 0,
          (d >> 16 & 1) != 0,
          (d >> 4 & 3) == 0};
  auto refuse = [&](const std::string& why) {
    throw EmulationError("tcgen05 instruction descriptor " + hex(d) + ": " + why);
  };
  if (d >> 2 & 1) refuse("sparse matrices are not emulated");
  if ((d >> 4 & 3) > 1) refuse("the result is neither f16 nor f32");
  if (mma.a == Type::none || mma.b == Type::none)
    refuse("an element type that this kind lacks or that is not emulated");
  if (mma.half && (mma.a == Type::bf16 || mma.a == Type::tf32)) refuse("an f16 result of bf16 or tf32");
  if (kind == 0 && mma.a != mma.b) refuse("A and B have different types");
  if (mma.rows != 64 && mma.rows != 128) refuse("M is " + std::to_string(mma.rows) + ", not 64 or 128");
  uint32_t step = mma.rows == 64 ? 8 : 16;
  if (mma.columns < step || mma.columns > 256 || mma.columns % step)
    refuse("N is " + std::to_string(mma.columns) + " with M " + std::to_string(mma.rows));
  mma.depth = 32 / static_cast<uint32_t>(size_of(mma.a));
  return mma;
}

/// Atoms of 32 bytes exist for rows that are contiguous, and 32-bit elements need them there.
void check_layout(Type type, uint64_t descriptor, bool transposed) {
  bool wide = descriptor >> 61 == 1;
  if (wide && !transposed)
    throw EmulationError("tcgen05 descriptor " + hex(descriptor) +
                         ": the swizzle with atoms of 32 bytes needs a transposed matrix");
  if (type == Type::tf32 && transposed && !wide)
    throw EmulationError("tcgen05 descriptor " + hex(descriptor) +
                         ": transposed tf32 is emulated with the swizzle with atoms of 32 bytes only");
}

/// Lane of tensor memory that holds a row of D, and of A where that is in tensor memory.
uint32_t lane_of(const Mma& mma, uint32_t row) { return mma.rows == 128 ? row : row / 16 * 32 + row % 16; }

Status multiply(Warp& warp, const Instruction& in, uint32_t mask) {
  if (mask & (mask - 1))
    throw EmulationError("tcgen05.mma is issued by one thread, here by " + std::to_string(__builtin_popcount(mask)));
  Cta& cta = warp.cta;
  TensorMemory& memory = *cta.tensor_memory;
  int lane = warp.lane;
  Mma mma = decode_instruction_descriptor(static_cast<uint32_t>(warp.bits(in.args[3], lane)), in.detail[0]);
  auto d = static_cast<uint32_t>(warp.address(in.args[0], lane));
  bool a_in_memory = in.args[1].kind == Operand::Kind::address;
  uint32_t base = d >> 16, d_column = d & 0xffff;
  if (base != 0 && !(mma.rows == 64 && base == 16))
    throw EmulationError("D begins in lane " + std::to_string(base) + " of tensor memory");
  TensorRegion d_region{0, kTensorLanes, d_column, mma.columns};
  bool accumulate = warp.bits(in.args[static_cast<size_t>(in.detail[1])], lane) != 0;
  uint32_t keep[4] = {};
  if (in.detail[2])
    for (size_t i = 0; i < 4; ++i) keep[i] = static_cast<uint32_t>(warp.bits(in.args[4].parts.at(i), lane));
  cta.counters.mma_operations += 2ull * mma.rows * mma.columns * mma.depth;
  Epoch user{++memory.issued, kTensorAgent};
  memory.begin_mma(d_region, true, warp.tensor_access(user));
  if (accumulate)
    for (uint32_t row = 0; row < mma.rows; ++row)
      memory.check_written({base + lane_of(mma, row), 1, d_column, mma.columns}, "tcgen05.mma, accumulation");

  auto chunks = std::make_shared<std::vector<uint32_t>>();
  uint64_t a_descriptor = 0, b_descriptor = warp.bits(in.args[2], lane);
  TensorRegion a_region{};
  if (a_in_memory) {
    auto a = static_cast<uint32_t>(warp.address(in.args[1], lane));
    a_region = {0, kTensorLanes, a & 0xffff, 8};  // 32 bytes of each row
    if ((a >> 16) != base) throw EmulationError("A begins in lane " + std::to_string(a >> 16) + " of tensor memory");
    if (mma.transpose_a) throw EmulationError("A in tensor memory can't be transposed");
    memory.begin_mma(a_region, false, warp.tensor_access(user));
    for (uint32_t row = 0; row < mma.rows; ++row)
      memory.check_written({base + lane_of(mma, row), 1, a_region.column, 8}, "tcgen05.mma, A");
  } else {
    a_descriptor = warp.bits(in.args[1], lane);
    check_layout(mma.a, a_descriptor, mma.transpose_a);
    matrix_chunks(tcgen05_layout(a_descriptor), static_cast<uint32_t>(size_of(mma.a)), 0, mma.rows, mma.depth,
                  mma.transpose_a, *chunks);
  }
  check_layout(mma.b, b_descriptor, mma.transpose_b);
  matrix_chunks(tcgen05_layout(b_descriptor), static_cast<uint32_t>(size_of(mma.b)), 0, mma.columns, mma.depth,
                mma.transpose_b, *chunks);
  auto thread = static_cast<uint16_t>(warp.thread(lane));
  for (uint32_t chunk : *chunks)
    cta.shared.begin_async_read(chunk, kGranule, thread, Reader::mma, warp.clock, user,
                                [&](uint16_t of) { return cta.fences[of]; });
  TensorMemory::Issued& issued = memory.issued_by[thread];
  issued.last = memory.issued;
  issued.releases.push_back([&cta, &memory, chunks, d_region, a_region, a_in_memory] {
    for (uint32_t chunk : *chunks) cta.shared.end_async_read(chunk, kGranule, Reader::mma);
    memory.end_mma(d_region);
    if (a_in_memory) memory.end_mma(a_region);
  });
  for (uint32_t row = 0; row < mma.rows; ++row) {
    uint32_t at = base + lane_of(mma, row);
    if (!(keep[at / 32] >> at % 32 & 1)) memory.mark_written({at, 1, d_column, mma.columns});
  }
  std::array<uint32_t, 4> kept{keep[0], keep[1], keep[2], keep[3]};
  cta.submit_ordered([=, &cta, &memory] {
    std::vector<float> a(mma.rows * mma.depth), b(mma.columns * mma.depth), old;
    if (a_in_memory) {
      auto size = static_cast<uint32_t>(size_of(mma.a)), per_cell = 4 / size;
      for (uint32_t row = 0; row < mma.rows; ++row)
        for (uint32_t k = 0; k < mma.depth; ++k) {
          const auto* cell =
              reinterpret_cast<const uint8_t*>(memory.row(base + lane_of(mma, row), a_region.column + k / per_cell));
          a[row * mma.depth + k] = decode_element(mma.a, cell + k % per_cell * size);
        }
    } else {
      read_matrix(cta.shared.data(), tcgen05_layout(a_descriptor), mma.a, 0, mma.rows, mma.depth, mma.transpose_a,
                  false, mma.depth, a.data());
    }
    read_matrix(cta.shared.data(), tcgen05_layout(b_descriptor), mma.b, 0, mma.columns, mma.depth, mma.transpose_b,
                true, mma.columns, b.data());
    if (mma.negate_a != mma.negate_b)
      for (float& x : a) x = -x;
    for (uint32_t row = 0; row < mma.rows; ++row) {
      uint32_t at = base + lane_of(mma, row);
      if (kept[at / 32] >> at % 32 & 1) continue;
      float* to = memory.row(at, d_column);
      if (mma.half && accumulate)
        for (uint32_t n = 0; n < mma.columns; ++n) to[n] = from_f16(static_cast<uint16_t>(as_bits(to[n])));
      if (!accumulate) std::fill_n(to, mma.columns, 0.0f);
      multiply_add(1, mma.columns, mma.depth, &a[row * mma.depth], b.data(), to);
      if (mma.half)
        for (uint32_t n = 0; n < mma.columns; ++n) to[n] = as_float(to_f16(to[n]));
    }
  });
  return Status::next;
}

/// What this warp has done in tensor memory is from now on among what it publishes.
void fence_before(Warp& warp) {
  size_t agent = warp.tensor_agent();
  warp.clock.at[agent] = warp.fenced.at[agent] = warp.fenced_wide.at[agent] = warp.tensor_stamp++;
}

Status fence_before_sync(Warp& warp, const Instruction&, uint32_t) {
  fence_before(warp);
  return Status::next;
}

/// What this warp has seen published of tensor memory counts from now on.
Status fence_after_sync(Warp& warp, const Instruction&, uint32_t) {
  for (size_t agent = kFirstTensorWarpAgent; agent < kFirstCopyAgent; ++agent)
    if (agent != warp.tensor_agent())
      warp.tensor_clock.at[agent] = std::max(warp.clock.at[agent], warp.observed.at[agent]);
  return Status::next;
}

/// Implies tcgen05.fence::before_thread_sync.
Status commit(Warp& warp, const Instruction& in, uint32_t mask) {
  Cta& cta = warp.cta;
  each_lane(warp, mask, [&](int lane) {
    uint32_t barrier = cta.shared_address(Space::shared, warp.address(in.args[0], lane) & ~kWindowMask);
    cta.mbarriers.used_by(barrier, warp);
    if (in.args.size() > 1 && warp.bits(in.args[1], lane) != 1)
      throw EmulationError("tcgen05.commit to other CTAs in a cluster of one");
    fence_before(warp);
    Clock seen = warp.publish();
    TensorMemory::Issued& issued = cta.tensor_memory->issued_by[warp.thread(lane)];
    seen.at[kTensorAgent] = std::max(seen.at[kTensorAgent], issued.last);
    auto releases = std::make_shared<std::vector<std::function<void()>>>(std::move(issued.releases));
    issued.releases.clear();
    auto index = static_cast<uint32_t>(warp.index);
    uint32_t issuer = recorder ? recorder->instruction : 0;
    cta.submit_ordered([&cta, barrier, releases, seen, index, issuer] {
      for (auto& release : *releases) release();
      if (recorder) recorder->warp = index, recorder->instruction = issuer;
      note(Event::arrive, barrier, cta.mbarriers.at(barrier).phase);
      cta.mbarriers.arrive(barrier, 1, seen);
      cta.event();
    });
  });
  return Status::next;
}

void decode_tcgen05(Instruction& in) {
  const std::string what = in.mode();
  if (what == "alloc") {
    expect_count(in, 2, 2);
    in.run = allocate;
  } else if (what == "dealloc") {
    expect_count(in, 2, 2);
    in.run = deallocate;
  } else if (what == "relinquish_alloc_permit") {
    in.run = relinquish;
  } else if (what == "ld" || what == "st") {
    in.detail[0] = -1;
    in.detail[2] = in.has("pack::16b") || in.has("unpack::16b");
    in.detail[3] = what == "ld" ? 2 : 1;
    for (int i = 0; i < 5; ++i)
      if (in.has(kShapes[i].name)) in.detail[0] = i;
    for (const std::string& part : in.parts)
      if (part[0] == 'x' && part.size() > 1) in.detail[1] = std::atoi(part.c_str() + 1);
    if (in.detail[0] < 0 || in.detail[1] < 1) return;
    size_t operands = in.detail[0] == k16x32x2 ? 3 : 2;
    expect_count(in, operands, operands);
    size_t expected = kShapes[in.detail[0]].registers * static_cast<size_t>(in.detail[1]);
    const std::vector<Operand>& registers = (what == "ld" ? in.args.front() : in.args.back()).parts;
    if (registers.size() != expected)
      throw EmulationError(std::to_string(registers.size()) + " registers, expected " + std::to_string(expected));
    in.run = what == "ld" ? load : store;
  } else if (what == "wait::ld") {
    in.run = wait_loads;
  } else if (what == "wait::st") {
    in.run = wait_stores;
  } else if (what == "fence::before_thread_sync") {
    in.run = fence_before_sync;
  } else if (what == "fence::after_thread_sync") {
    in.run = fence_after_sync;
  } else if (what == "commit") {
    expect_count(in, 1, 2);
    in.run = commit;
  } else if (what == "mma") {
    in.detail[0] = in.has("kind::f16") ? 0 : in.has("kind::tf32") ? 1 : in.has("kind::f8f6f4") ? 2 : -1;
    if (in.detail[0] < 0) return;
    in.detail[2] = in.args.size() > 5 && in.args[4].kind == Operand::Kind::vector;
    in.detail[1] = 4 + in.detail[2];
    expect_count(in, 5 + static_cast<size_t>(in.detail[2]), 5 + static_cast<size_t>(in.detail[2]));
    in.run = multiply;
  }
}

}  // namespace

std::vector<Opcode> tcgen05_opcodes() {
  return {{"tcgen05", "TensorCore 5th Generation Family Instructions", decode_tcgen05,
           "alloc dealloc relinquish_alloc_permit ld st wait::ld wait::st fence::before_thread_sync "
           "fence::after_thread_sync "
           "commit mma sync aligned cta_group::1 shared::cta shared::cluster mbarrier::arrive::one multicast::cluster "
           "kind::f16 kind::tf32 kind::f8f6f4 collector::a::discard pack::16b unpack::16b "
           "32x32b 16x64b 16x128b 16x256b 16x32bx2 x1 x2 x4 x8 x16 x32 x64 x128"}};
}

}  // namespace gnaforge::emulator
