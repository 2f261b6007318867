// PTX ISA: Asynchronous Warpgroup Level Matrix Instructions (wgmma); ldmatrix, stmatrix.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "formats.h"
#include "matrix.h"
#include "matrix_layout.h"
#include "opcodes.h"

namespace gnaforge::emulator {

void MatrixState::fail() {
  throw EmulationError(
      "the instruction touches a register that a matrix instruction in flight still uses; wgmma.wait_group or "
      "tcgen05.wait::ld must come first");
}

namespace {

bool whole_warp(Warp& warp, uint32_t mask) { return (mask & warp.alive) == warp.alive; }

// --- wgmma

/// detail: 0 columns, 1 depth, 2 the A type, 3 bits: A in registers, A rows contiguous, B rows contiguous, D is f16.
constexpr int kRegistersA = 1, kTransposeA = 2, kTransposeB = 4, kHalfD = 8;

MatrixLayout layout_of(uint64_t descriptor) {
  static constexpr uint32_t kSwizzle[] = {0, 3, 2, 1};
  if (descriptor >> 49 & 7)
    throw EmulationError("wgmma descriptor " + hex(descriptor) +
                         " has a base offset: start its matrix at a multiple of the swizzle's repeat");
  return {static_cast<uint32_t>(descriptor & 0x3fff) << 4, static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4,
          static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4, kSwizzle[descriptor >> 62]};
}

/// B as floats, [k][column].
const float* decoded_b(Warp& warp, const PendingMma& mma) {
  const Instruction& in = *mma.instruction;
  Cta& cta = warp.cta;
  size_t slot =
      (mma.descriptor_b ^ mma.descriptor_b >> 6 ^ reinterpret_cast<uintptr_t>(&in) >> 4) % cta.decoded.entries.size();
  DecodedMatrices::Entry& entry = cta.decoded.entries[slot];
  if (entry.descriptor != mma.descriptor_b || entry.version != cta.shared.version() || entry.instruction != &in) {
    auto columns = static_cast<uint32_t>(in.detail[0]), depth = static_cast<uint32_t>(in.detail[1]);
    entry.values.resize(columns * depth);
    read_matrix(cta.shared.data(), layout_of(mma.descriptor_b), in.type, 0, columns, depth, in.detail[3] & kTransposeB,
                true, columns, entry.values.data());
    if (in.args[5].value < 0)
      for (float& x : entry.values) x = -x;
    entry.descriptor = mma.descriptor_b;
    entry.version = cta.shared.version();
    entry.instruction = &in;
  }
  return entry.values.data();
}

void compute(Warp& warp, PendingMma& mma) {
  const Instruction& in = *mma.instruction;
  auto columns = static_cast<uint32_t>(in.detail[0]), depth = static_cast<uint32_t>(in.detail[1]);
  auto type_a = static_cast<Type>(in.detail[2]);
  int form = in.detail[3];
  const uint8_t* shared = warp.cta.shared.data();
  static thread_local std::vector<float> a, c;
  a.assign(16 * depth, 0.0f);
  c.assign(16 * columns, 0.0f);
  if (form & kRegistersA) {
    // A fragment: register q of a lane holds 32 bits of row lane / 4 + 8 (q & 1), 16-byte column q >> 1.
    auto size = static_cast<uint32_t>(size_of(type_a)), per_register = 4 / size;
    for (uint32_t q = 0; q < 4; ++q)
      for (uint32_t lane = 0; lane < kWarpSize; ++lane) {
        const auto* bytes = reinterpret_cast<const uint8_t*>(&mma.a[q * kWarpSize + lane]);
        uint32_t row = lane / 4 + 8 * (q & 1), k = (lane % 4 + 4 * (q >> 1)) * per_register;
        for (uint32_t i = 0; i < per_register; ++i) a[row * depth + k + i] = decode_element(type_a, bytes + i * size);
      }
  } else {
    auto first = static_cast<uint32_t>(16 * (warp.index % 4));
    read_matrix(shared, layout_of(mma.descriptor_a), type_a, first, 16, depth, form & kTransposeA, false, depth,
                a.data());
  }
  if (in.args[4].value < 0)
    for (float& x : a) x = -x;
  const float* b = decoded_b(warp, mma);
  // Accumulator fragment: element (row lane / 4 + 8 h, column 8 j + 2 (lane % 4) + e) of register 4 j + 2 h + e.
  const std::vector<Operand>& registers = in.args[0].parts;
  auto at = [&](uint32_t j, uint32_t h, uint32_t lane) {
    return (lane / 4 + 8 * h) * columns + 8 * j + 2 * (lane % 4);
  };
  bool half = form & kHalfD;
  for (int direction = mma.accumulate ? 0 : 1; direction < 2; ++direction) {
    if (direction == 1) multiply_add(16, columns, depth, a.data(), b, c.data());
    for (uint32_t j = 0; j < columns / 8; ++j)
      for (uint32_t h = 0; h < 2; ++h) {
        if (half) {
          auto* words = warp.out<uint32_t>(registers[2 * j + h]);
          for (uint32_t lane = 0; lane < kWarpSize; ++lane) {
            float* pair = &c[at(j, h, lane)];
            if (direction == 0) {
              pair[0] = from_f16(static_cast<uint16_t>(words[lane]));
              pair[1] = from_f16(static_cast<uint16_t>(words[lane] >> 16));
            } else {
              words[lane] = to_f16(pair[0]) | uint32_t{to_f16(pair[1])} << 16;
            }
          }
          continue;
        }
        for (uint32_t e = 0; e < 2; ++e) {
          auto* values = warp.out<float>(registers[4 * j + 2 * h + e]);
          float* corner = &c[at(j, h, 0) + e];
          for (uint32_t row = 0; row < 8; ++row)
            for (uint32_t pair = 0; pair < 4; ++pair) {
              float &inside = corner[row * columns + 2 * pair], &value = values[4 * row + pair];
              (direction == 0 ? inside : value) = direction == 0 ? value : inside;
            }
        }
      }
  }
  mma.computed = true;
}

void mark_registers(MatrixState& state, const Instruction& in, int by) {
  auto mark = [&](const Operand& op) {
    state.in_flight[op.reg_index] = static_cast<uint16_t>(state.in_flight[op.reg_index] + by);
  };
  for (const Operand& op : in.args[0].parts) mark(op);
  if (in.detail[3] & kRegistersA)
    for (const Operand& op : in.args[1].parts) mark(op);
}

template <class F>
bool each_pending(MatrixState& state, F&& f) {
  for (MmaGroup& group : state.groups)
    for (PendingMma& mma : group.mmas)
      if (f(mma)) return true;
  for (PendingMma& mma : state.open)
    if (f(mma)) return true;
  return false;
}

void check_registers(MatrixState& state, const Instruction& in) {
  if (state.epoch == 1) throw EmulationError("the first wgmma.mma_async of a warp needs a wgmma.fence before it");
  for (const Operand& op : in.args[0].parts) {
    if (state.written[op.reg_index] >= state.epoch)
      throw EmulationError("an accumulator register was written after the last wgmma.fence");
    if (!state.in_flight[op.reg_index]) continue;
    // In-order accumulation into the same registers by the same shape needs no fence; anything else does.
    bool other = each_pending(state, [&](const PendingMma& pending) {
      const Instruction& before = *pending.instruction;
      bool same = before.parts[4] == in.parts[4] && before.args[0].parts.size() == in.args[0].parts.size();
      for (size_t i = 0; same && i < in.args[0].parts.size(); ++i)
        same = before.args[0].parts[i].reg_index == in.args[0].parts[i].reg_index;
      if (same) return false;
      for (const Operand& theirs : before.args[0].parts)
        if (theirs.reg_index == op.reg_index) return true;
      if (before.detail[3] & kRegistersA)
        for (const Operand& theirs : before.args[1].parts)
          if (theirs.reg_index == op.reg_index) return true;
      return false;
    });
    if (other) throw EmulationError("an accumulator register is in use by another wgmma in flight");
    return;  // the registers of one instruction are in flight together
  }
  if (!(in.detail[3] & kRegistersA)) return;
  for (const Operand& op : in.args[1].parts) {
    if (state.written[op.reg_index] >= state.epoch)
      throw EmulationError("a register of A was written after the last wgmma.fence");
    bool accumulator = state.in_flight[op.reg_index] && each_pending(state, [&](const PendingMma& pending) {
                         for (const Operand& theirs : pending.instruction->args[0].parts)
                           if (theirs.reg_index == op.reg_index) return true;
                         return false;
                       });
    if (accumulator) throw EmulationError("a register of A is the accumulator of a wgmma in flight");
  }
}

/// Enters the wgmma in its warpgroup's log, where the warps must agree.
WarpgroupLog::Entry& enter(Warp& warp, const Instruction& in, PendingMma& mma) {
  WarpgroupLog& log = warp.cta.warpgroups[static_cast<size_t>(warp.index / 4)];
  mma.sequence = warp.matrix->issued++;
  if (mma.sequence - log.forgotten == log.entries.size()) {
    log.entries.emplace_back();
    log.entries.back().instruction = &in;
    log.entries.back().descriptor_a = mma.descriptor_a;
    log.entries.back().descriptor_b = mma.descriptor_b;
  }
  WarpgroupLog::Entry& entry = log.at(mma.sequence);
  if (entry.instruction != &in || entry.descriptor_a != mma.descriptor_a || entry.descriptor_b != mma.descriptor_b)
    throw EmulationError(
        "the warps of a warpgroup disagree: another warp's wgmma at this place has other operands (descriptors " +
        hex(entry.descriptor_a) + ", " + hex(entry.descriptor_b) + ")");
  if (++entry.issued == 4) warp.cta.event();
  return entry;
}

/// Checks and notes the shared memory that this warp's rows of A, and B once per warpgroup, take.
void begin_reads(Warp& warp, const Clock& clock, const Instruction& in, const PendingMma& mma,
                 WarpgroupLog::Entry& entry, bool with_b) {
  auto depth = static_cast<uint32_t>(in.detail[1]);
  size_t first = entry.chunks.size();
  if (!(in.detail[3] & kRegistersA)) {
    auto element = static_cast<uint32_t>(size_of(static_cast<Type>(in.detail[2])));
    matrix_chunks(layout_of(mma.descriptor_a), element, static_cast<uint32_t>(16 * (warp.index % 4)), 16, depth,
                  in.detail[3] & kTransposeA, entry.chunks);
  }
  if (with_b)
    matrix_chunks(layout_of(mma.descriptor_b), static_cast<uint32_t>(size_of(in.type)), 0,
                  static_cast<uint32_t>(in.detail[0]), depth, in.detail[3] & kTransposeB, entry.chunks);
  // The fence may be any lane's of this warp: they go on together.
  auto thread = static_cast<uint16_t>(warp.thread(0));
  uint64_t own = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) own = std::max(own, warp.cta.fences[static_cast<size_t>(thread + lane)]);
  Epoch reader{static_cast<uint32_t>(mma.sequence + 1), static_cast<uint8_t>(kFirstWarpgroupAgent + warp.index / 4)};
  for (size_t i = first; i < entry.chunks.size(); ++i)
    warp.cta.shared.begin_async_read(entry.chunks[i], kGranule, thread, Reader::mma, clock, reader,
                                     [&](uint16_t of) { return of == thread ? own : warp.cta.fences[of]; });
}

/// The same for all warps at once, after what each did before it issued the wgmma.
void begin_reads_together(Warp& warp, const Instruction& in, const PendingMma& mma, WarpgroupLog::Entry& entry) {
  const auto& warps = warp.cta.warps;
  size_t first = static_cast<size_t>(warp.index / 4) * 4;
  Clock clock = warp.clock;
  for (size_t i = first; i < first + 4; ++i) clock.join(warps[i]->clock);
  for (size_t i = first; i < first + 4; ++i) begin_reads(*warps[i], clock, in, mma, entry, i == first);
}

Status issue(Warp& warp, const Instruction& in, uint32_t mask) {
  if (mask != ~0u) {
    if (warp.alive != ~0u) throw EmulationError("wgmma needs all 32 lanes of the warp");
    return Status::blocked;
  }
  if (warp.cta.launch.threads() / 128 <= static_cast<uint32_t>(warp.index / 4))
    throw EmulationError("wgmma needs a whole warpgroup of 128 threads");
  MatrixState& state = *warp.matrix;
  check_registers(state, in);
  PendingMma mma;
  mma.instruction = &in;
  bool from_registers = in.detail[3] & kRegistersA;
  auto uniform64 = [&](const Operand& op) {
    uint64_t value = warp.bits(op, 0);
    for (int lane = 1; lane < kWarpSize; ++lane)
      if (warp.bits(op, lane) != value) throw EmulationError("the matrix descriptor differs between lanes");
    return value;
  };
  if (from_registers) {
    mma.a.resize(4 * kWarpSize);
    for (size_t q = 0; q < 4; ++q)
      std::memcpy(&mma.a[q * kWarpSize], warp.in<uint32_t>(in.args[1].parts[q]), 4 * kWarpSize);
  } else {
    mma.descriptor_a = uniform64(in.args[1]);
  }
  mma.descriptor_b = uniform64(in.args[2]);
  uint32_t accumulate = in.args[3].is_register() ? warp.predicate(in.args[3]) : in.args[3].value ? ~0u : 0u;
  if (accumulate != 0 && accumulate != ~0u) throw EmulationError("scale-d differs between lanes");
  mma.accumulate = accumulate != 0;
  WarpgroupLog::Entry& entry = enter(warp, in, mma);
  if (!warp.cta.launch.options.relaxed_warpgroups)
    begin_reads(warp, warp.clock, in, mma, entry, entry.issued == 1);
  else if (entry.issued == 4)
    begin_reads_together(warp, in, mma, entry);
  mark_registers(state, in, 1);
  ++state.busy;
  state.last = &in;
  state.open.push_back(std::move(mma));
  warp.cta.counters.mma_operations +=
      2ull * 16 * static_cast<uint64_t>(in.detail[0]) * static_cast<uint64_t>(in.detail[1]);  // 16 of the 64 rows
  bool now = warp.cta.timing() == Timing::eager || (warp.cta.timing() == Timing::random && warp.cta.chance(0.5));
  while (now && compute_oldest(warp)) {
  }
  return Status::next;
}

Status fence(Warp& warp, const Instruction&, uint32_t mask) {
  if (!whole_warp(warp, mask)) return Status::blocked;
  ++warp.matrix->epoch;
  return Status::next;
}

Status commit(Warp& warp, const Instruction&, uint32_t mask) {
  if (!whole_warp(warp, mask)) return Status::blocked;
  warp.matrix->groups.push_back({std::move(warp.matrix->open)});
  warp.matrix->open.clear();
  return Status::next;
}

Status wait(Warp& warp, const Instruction& in, uint32_t mask) {
  if (!whole_warp(warp, mask) || !all_issued(warp, static_cast<size_t>(in.args[0].value))) return Status::blocked;
  retire_groups(warp, static_cast<size_t>(in.args[0].value));
  return Status::next;
}

void decode_wgmma(Instruction& in) {
  const std::string what = in.mode();
  if (what == "fence") in.run = fence;
  if (what == "commit_group") in.run = commit;
  if (what == "wait_group") {
    expect_count(in, 1, 1);
    in.run = wait;
  }
  if (what != "mma_async" || in.parts.size() != 8) return;
  int rows, columns, depth;
  int read = 0;
  if (std::sscanf(in.parts[4].c_str(), "m%dn%dk%d%n", &rows, &columns, &depth, &read) != 3 ||
      in.parts[4][static_cast<size_t>(read)])
    return;
  Type d = type_named(in.parts[5]), a = type_named(in.parts[6]), b = type_named(in.parts[7]);
  int size = size_of(a);
  bool known = (a == b && (a == Type::bf16 || a == Type::f16 || a == Type::tf32)) ||
               ((a == Type::e4m3 || a == Type::e5m2) && (b == Type::e4m3 || b == Type::e5m2));
  if (!known || (d != Type::f32 && d != Type::f16) || (d == Type::f16 && (a == Type::bf16 || a == Type::tf32))) return;
  if (rows != 64 || columns % 8 || columns < 8 || columns > 256 || depth * size != 32)
    throw EmulationError("wgmma has no shape " + in.parts[4] + " for " + in.parts[6]);
  bool from_registers = in.args.at(1).kind == Operand::Kind::vector;
  size_t plain = 6, transposes = size == 2 ? (from_registers ? 1 : 2) : 0;
  expect_count(in, plain + transposes, plain + transposes);
  auto expected = static_cast<size_t>(d == Type::f32 ? columns / 2 : columns / 4);
  if (in.args[0].parts.size() != expected)
    throw EmulationError(std::to_string(in.args[0].parts.size()) + " accumulator registers, expected " +
                         std::to_string(expected));
  if (from_registers && in.args[1].parts.size() != 4) throw EmulationError("matrix A takes 4 registers");
  bool transpose_a = size == 2 && !from_registers && in.args[6].value;
  bool transpose_b = size == 2 && in.args[from_registers ? 6 : 7].value;
  in.detail[0] = columns;
  in.detail[1] = depth;
  in.detail[2] = static_cast<int>(a);
  in.detail[3] = (from_registers ? kRegistersA : 0) | (transpose_a ? kTransposeA : 0) |
                 (transpose_b ? kTransposeB : 0) | (d == Type::f16 ? kHalfD : 0);
  in.type = b;
  in.run = issue;
}

// --- ldmatrix, stmatrix: 8x8 matrices of 16-bit elements

template <bool Store>
Status move_matrices(Warp& warp, const Instruction& in, uint32_t mask) {
  if (mask != ~0u) {
    if (warp.alive != ~0u) throw EmulationError("ldmatrix and stmatrix need all 32 lanes");
    return Status::blocked;
  }
  const Operand& registers = in.args[Store ? 1 : 0];
  const Operand& address = in.args[Store ? 0 : 1];
  auto count = static_cast<size_t>(in.detail[0]);
  uint32_t words[4][kWarpSize];
  if (Store)
    for (size_t m = 0; m < count; ++m) std::memcpy(words[m], warp.in<uint32_t>(registers.parts[m]), sizeof words[m]);
  // Lane 8 m + row holds the address of that row of matrix m; a lane's word is two elements of row lane / 4.
  for (size_t m = 0; m < count; ++m)
    for (int row = 0; row < 8; ++row) {
      warp.lane = static_cast<int>(8 * m) + row;
      uint64_t at = warp.address(address, warp.lane);
      uint16_t elements[8];
      if (Store) {
        for (int column = 0; column < 8; ++column) {
          int r = in.detail[1] ? column : row, c = in.detail[1] ? row : column;
          elements[column] = static_cast<uint16_t>(words[m][4 * r + c / 2] >> (16 * (c & 1)));
        }
        std::memcpy(warp.cta.write(warp, in.space, at, 16), elements, 16);
      } else {
        std::memcpy(elements, warp.cta.read(warp, in.space, at, 16), 16);
        for (int column = 0; column < 8; ++column) {
          int r = in.detail[1] ? column : row, c = in.detail[1] ? row : column;
          uint32_t& word = words[m][4 * r + c / 2];
          word = c & 1 ? (word & 0xffffu) | uint32_t{elements[column]} << 16 : (word & 0xffff0000u) | elements[column];
        }
      }
    }
  if (!Store)
    for (size_t m = 0; m < count; ++m) warp.put(registers.parts[m], mask, words[m]);
  return Status::next;
}

void decode_matrices(Instruction& in) {
  bool store = in.parts[0] == "stmatrix";
  expect_count(in, 2, 2);
  if (!in.has("m8n8") || in.type != Type::b16) return;
  in.detail[0] = in.has("x4") ? 4 : in.has("x2") ? 2 : 1;
  in.detail[1] = in.has("trans");
  if (in.args[store ? 1 : 0].parts.size() != static_cast<size_t>(in.detail[0]))
    throw EmulationError("register count differs from the number of matrices");
  in.run = store ? move_matrices<true> : move_matrices<false>;
}

}  // namespace

bool compute_oldest(Warp& warp) {
  WarpgroupLog& log = warp.cta.warpgroups[static_cast<size_t>(warp.index / 4)];
  bool done = false;
  each_pending(*warp.matrix, [&](PendingMma& mma) {
    if (mma.computed) return false;
    done = !warp.cta.launch.options.relaxed_warpgroups || log.at(mma.sequence).issued == 4;
    if (done) compute(warp, mma);
    return true;
  });
  return done;
}

bool all_issued(Warp& warp, size_t keep) {
  MatrixState& state = *warp.matrix;
  WarpgroupLog& log = warp.cta.warpgroups[static_cast<size_t>(warp.index / 4)];
  for (size_t i = 0; i + keep < state.groups.size(); ++i)
    for (const PendingMma& mma : state.groups[i].mmas)
      if (log.at(mma.sequence).issued < 4) return false;
  return true;
}

void retire_groups(Warp& warp, size_t keep) {
  MatrixState& state = *warp.matrix;
  WarpgroupLog& log = warp.cta.warpgroups[static_cast<size_t>(warp.index / 4)];
  while (state.groups.size() > keep) {
    for (PendingMma& mma : state.groups.front().mmas) {
      WarpgroupLog::Entry& entry = log.at(mma.sequence);
      if (!entry.complete) {
        for (int sibling = warp.index / 4 * 4; sibling < warp.index / 4 * 4 + 4; ++sibling) {
          Warp& other = *warp.cta.warps[static_cast<size_t>(sibling)];
          each_pending(*other.matrix, [&](PendingMma& theirs) {
            if (theirs.sequence > mma.sequence) return true;
            if (!theirs.computed) compute(other, theirs);
            return false;
          });
        }
        for (uint32_t chunk : entry.chunks) warp.cta.shared.end_async_read(chunk, kGranule, Reader::mma);
        entry.complete = true;
      }
      warp.clock.at[static_cast<size_t>(kFirstWarpgroupAgent + warp.index / 4)] =
          static_cast<uint32_t>(mma.sequence + 1);
      mark_registers(state, *mma.instruction, -1);
      --state.busy;
      ++entry.retired;
    }
    state.groups.pop_front();
  }
  while (!log.entries.empty() && log.entries.front().retired == 4) {
    log.entries.pop_front();
    ++log.forgotten;
  }
}

std::vector<Opcode> matrix_opcodes() {
  static const char* const kMatrices = "sync aligned m8n8 x1 x2 x4 trans shared shared::cta";
  return {
      {"wgmma", "Asynchronous Warpgroup Level Matrix Instructions", decode_wgmma,
       "fence commit_group wait_group mma_async sync aligned m64n*"},
      {"ldmatrix", "Warp Level Matrix Load: ldmatrix", decode_matrices, kMatrices},
      {"stmatrix", "Warp Level Matrix Store: stmatrix", decode_matrices, kMatrices},
  };
}

}  // namespace gnaforge::emulator
