// PTX ISA: Data Movement and Conversion Instructions: mov, ld, st, cvta, mapa and hints.
#include "opcodes.h"

namespace gnaforge::emulator {
namespace {

// --- mov

template <class T>
Status move(Warp& warp, const Instruction& in, uint32_t mask) {
  T copy[kWarpSize];
  std::memcpy(copy, warp.in<T>(in.args[1]), sizeof copy);
  warp.put(in.args[0], mask, copy);
  return Status::next;
}

Status move_predicate(Warp& warp, const Instruction& in, uint32_t mask) {
  warp.put_predicate(in.args[0], mask, warp.predicate(in.args[1]));
  return Status::next;
}

/// %clock and %globaltimer: the CTA's instruction count, which only grows.
Status move_clock(Warp& warp, const Instruction& in, uint32_t mask) {
  each_lane(warp, mask, [&](int lane) { warp.put_bits(in.args[0], lane, warp.cta.clock); });
  return Status::next;
}

int vector_bits(const Operand& op) {
  int bits = 0;
  for (const Operand& part : op.parts) bits += 8 * size_of(part.type);
  return bits;
}

/// Packs a vector into one register, first element lowest.
Status pack(Warp& warp, const Instruction& in, uint32_t mask) {
  const std::vector<Operand>& parts = in.args[1].parts;
  unsigned width = static_cast<unsigned>(8 * size_of(in.type) / static_cast<int>(parts.size()));
  each_lane(warp, mask, [&](int lane) {
    uint64_t value = 0, keep = width < 64 ? (uint64_t{1} << width) - 1 : ~uint64_t{0};
    for (size_t i = parts.size(); i-- > 0;)
      value = (width < 64 ? value << width : 0) | (warp.bits(parts[i], lane) & keep);
    warp.put_bits(in.args[0], lane, value);
  });
  return Status::next;
}
Status unpack(Warp& warp, const Instruction& in, uint32_t mask) {
  const std::vector<Operand>& parts = in.args[0].parts;
  unsigned width = static_cast<unsigned>(8 * size_of(in.type) / static_cast<int>(parts.size()));
  each_lane(warp, mask, [&](int lane) {
    uint64_t value = warp.bits(in.args[1], lane);
    for (const Operand& part : parts) {
      warp.put_bits(part, lane, width < 64 ? value & ((uint64_t{1} << width) - 1) : value);
      value = width < 64 ? value >> width : 0;
    }
  });
  return Status::next;
}

/// mov.b128 between a register of 128 bits and a pair of 64.
Status move_wide(Warp& warp, const Instruction& in, uint32_t mask) {
  auto at = [&](const Operand& op, int lane) { return warp.registers() + op.slot + 16 * lane; };
  each_lane(warp, mask, [&](int lane) {
    uint64_t value[2];
    if (in.args[1].kind == Operand::Kind::vector) {
      for (size_t i = 0; i < 2; ++i) value[i] = warp.bits(in.args[1].parts[i], lane);
    } else {
      std::memcpy(value, at(in.args[1], lane), 16);
    }
    if (in.args[0].kind == Operand::Kind::vector) {
      for (size_t i = 0; i < 2; ++i) warp.put_bits(in.args[0].parts[i], lane, value[i]);
    } else {
      std::memcpy(at(in.args[0], lane), value, 16);
    }
  });
  return Status::next;
}

void decode_mov(Instruction& in) {
  expect_count(in, 2, 2);
  for (const Operand& op : in.args)
    if (op.kind == Operand::Kind::label) throw EmulationError("unknown name " + op.symbol + ": " + in.text);
  if (in.args[1].clock) {
    in.run = move_clock;
    return;
  }
  int size = size_of(in.type);
  if (in.type == Type::pred) {
    in.run = move_predicate;
  } else if (size == 16) {
    in.run = move_wide;
  } else if (in.args[1].kind == Operand::Kind::vector) {
    in.run = pack;
  } else if (in.args[0].kind == Operand::Kind::vector) {
    if (vector_bits(in.args[0]) > 8 * size)
      throw EmulationError("vector wider than " + in.parts.back() + ": " + in.text);
    in.run = unpack;
  } else {
    expect_sizes(in, {size, size});
    if (size == 2) in.run = move<uint16_t>;
    if (size == 4) in.run = move<uint32_t>;
    if (size == 8) in.run = move<uint64_t>;
  }
}

// --- ld, st

/// Extends a loaded value to the register: signed types by their sign.
uint64_t extended(uint64_t value, Type type) {
  switch (type) {
    case Type::s8: return static_cast<uint64_t>(static_cast<int64_t>(static_cast<int8_t>(value)));
    case Type::s16: return static_cast<uint64_t>(static_cast<int64_t>(static_cast<int16_t>(value)));
    case Type::s32: return static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(value)));
    default: return value;
  }
}

const Operand& element(const Operand& op, size_t i) { return op.kind == Operand::Kind::vector ? op.parts[i] : op; }

Status load(Warp& warp, const Instruction& in, uint32_t mask) {
  auto size = static_cast<uint32_t>(size_of(in.type)), total = size * in.width;
  warp.cta.counters.load_bytes += uint64_t{total} * static_cast<uint64_t>(__builtin_popcount(mask));
  // All lanes read before any register changes: the address register may be the destination.
  uint8_t loaded[kWarpSize][32];
  each_lane(warp, mask, [&](int lane) {
    std::memcpy(loaded[lane], warp.cta.read(warp, in.space, warp.address(in.args[1], lane), total, in.detail[0]),
                total);
  });
  if (in.detail[0]) {
    Ordering order = Ordering::from_bits(in.detail[0]);
    each_lane(warp, mask, [&](int lane) { warp.cta.observe(warp, in.space, warp.address(in.args[1], lane), order); });
  }
  for (size_t i = 0; i < in.width; ++i) {
    const Operand& to = element(in.args[0], i);
    if (to.kind == Operand::Kind::sink) continue;
    each_lane(warp, mask, [&](int lane) {
      if (size == 16) {
        std::memcpy(warp.registers() + to.slot + 16 * lane, loaded[lane] + 16 * i, 16);
      } else {
        uint64_t value = 0;
        std::memcpy(&value, loaded[lane] + i * size, size);
        warp.put_bits(to, lane, extended(value, in.type));
      }
    });
  }
  return Status::next;
}

/// One address for all lanes that is known before the kernel runs: parameters.
template <class T>
Status load_param(Warp& warp, const Instruction& in, uint32_t mask) {
  T value, lanes[kWarpSize];
  std::memcpy(&value, warp.cta.read(warp, in.space, static_cast<uint64_t>(in.args[1].value), sizeof(T)), sizeof(T));
  for (T& lane : lanes) lane = value;
  warp.put(in.args[0], mask, lanes);
  return Status::next;
}

Status store(Warp& warp, const Instruction& in, uint32_t mask) {
  auto size = static_cast<uint32_t>(size_of(in.type)), total = size * in.width;
  warp.cta.counters.store_bytes += uint64_t{total} * static_cast<uint64_t>(__builtin_popcount(mask));
  each_lane(warp, mask, [&](int lane) {
    uint8_t* to = warp.cta.write(warp, in.space, warp.address(in.args[0], lane), total, in.detail[0]);
    // Before the value is there for other CTAs to see.
    if (in.detail[0])
      warp.cta.publish(warp, in.space, warp.address(in.args[0], lane), Ordering::from_bits(in.detail[0]), true);
    for (size_t i = 0; i < in.width; ++i) {
      const Operand& from = element(in.args[1], i);
      if (size == 16) {
        std::memcpy(to, warp.registers() + from.slot + 16 * lane, 16);
      } else {
        uint64_t value = warp.bits(from, lane);
        std::memcpy(to + i * size, &value, size);
      }
    }
  });
  // Others may poll for it.
  if (in.space != Space::local && in.space != Space::param) warp.cta.progress();
  return Status::next;
}

bool memory_form(Instruction& in, size_t address, size_t data) {
  in.detail[0] = ordering_of(in, true).bits();
  expect_count(in, 2, 3);  // a cache-policy operand may follow
  in.width = in.has("v2") ? 2 : in.has("v4") ? 4 : in.has("v8") ? 8 : 1;
  const Operand& values = in.args[data];
  if (in.args[address].kind != Operand::Kind::address) throw EmulationError("no address: " + in.text);
  if (in.width > 1 && values.parts.size() != in.width) throw EmulationError("vector length differs: " + in.text);
  return size_of(in.type) > 0;
}

void decode_ld(Instruction& in) {
  if (!memory_form(in, 1, 0)) return;
  in.run = load;
  const Operand& to = in.args[0];
  bool fixed = in.space == Space::param && in.width == 1 && !in.args[1].has_base && to.is_register() &&
               size_of(to.type) == size_of(in.type) &&
               (static_cast<uint64_t>(in.args[1].value) & kWindowMask) == kParamWindow;
  if (fixed && size_of(in.type) == 4) in.run = load_param<uint32_t>;
  if (fixed && size_of(in.type) == 8) in.run = load_param<uint64_t>;
}
void decode_st(Instruction& in) {
  if (!memory_form(in, 0, 1)) return;
  in.run = store;
}

// --- addresses

template <bool ToGeneric>
Status convert_address(Warp& warp, const Instruction& in, uint32_t mask) {
  uint64_t window = in.space == Space::shared  ? kSharedWindow
                    : in.space == Space::local ? kLocalWindow
                    : in.space == Space::param ? kParamWindow
                                               : 0;
  each_lane(warp, mask, [&](int lane) {
    uint64_t address = warp.bits(in.args[1], lane);
    if (ToGeneric) {
      if ((address & kWindowMask) == 0) address |= window;
    } else {
      if (window && (address & kWindowMask) != window)
        throw EmulationError(hex(address) + " is not in the state space named");
      address &= ~kWindowMask;
    }
    warp.put_bits(in.args[0], lane, address);
  });
  return Status::next;
}
void decode_cvta(Instruction& in) {
  expect_count(in, 2, 2);
  in.run = in.has("to") ? convert_address<false> : convert_address<true>;
}

Status is_space(Warp& warp, const Instruction& in, uint32_t mask) {
  uint32_t bits = 0;
  each_lane(warp, mask, [&](int lane) {
    uint64_t window = warp.bits(in.args[1], lane) & kWindowMask;
    bool is = in.space == Space::shared  ? window == kSharedWindow
              : in.space == Space::local ? window == kLocalWindow
              : in.space == Space::param ? window == kParamWindow
                                         : window == 0;
    bits |= uint32_t{is} << lane;
  });
  warp.put_predicate(in.args[0], mask, bits);
  return Status::next;
}
void decode_isspacep(Instruction& in) { in.run = is_space; }

/// mapa in a cluster of one CTA: rank 0 is the CTA itself.
Status map_address(Warp& warp, const Instruction& in, uint32_t mask) {
  each_lane(warp, mask, [&](int lane) {
    if (warp.bits(in.args[2], lane) != 0)
      throw EmulationError("mapa to CTA " + std::to_string(warp.bits(in.args[2], lane)) + " of a cluster of one");
    warp.put_bits(in.args[0], lane, warp.bits(in.args[1], lane));
  });
  return Status::next;
}
void decode_mapa(Instruction& in) {
  expect_count(in, 3, 3);
  in.run = map_address;
}
Status cluster_rank(Warp& warp, const Instruction& in, uint32_t mask) {
  each_lane(warp, mask, [&](int lane) { warp.put_bits(in.args[0], lane, 0); });
  return Status::next;
}
void decode_getctarank(Instruction& in) { in.run = cluster_rank; }

// --- hints

Status nothing(Warp&, const Instruction&, uint32_t) { return Status::next; }
void decode_hint(Instruction& in) { in.run = nothing; }

/// Cache policies are opaque: any value does.
Status make_policy(Warp& warp, const Instruction& in, uint32_t mask) {
  each_lane(warp, mask, [&](int lane) { warp.put_bits(in.args[0], lane, 0x14f0000000000000u); });
  return Status::next;
}
void decode_createpolicy(Instruction& in) { in.run = make_policy; }

}  // namespace

std::vector<Opcode> data_opcodes() {
  static const std::string kHints =
      " L1::evict_normal L1::evict_unchanged L1::evict_first L1::evict_last L1::no_allocate"
      " L2::evict_normal L2::evict_first L2::evict_last L2::cache_hint L2::64B L2::128B L2::256B";
  static const std::string kPlaces = " cta cluster gpu sys global local shared shared::cta shared::cluster v2 v4 v8";
  static const std::string kLoads =
      "weak relaxed acquire volatile nc ca cg cs lu cv param param::entry param::func const" + kPlaces + kHints;
  static const std::string kStores = "weak relaxed release volatile wb cg cs wt param param::func" + kPlaces + kHints;
  return {
      {"mov", "Data Movement: mov", decode_mov},
      {"ld", "Data Movement: ld", decode_ld, kLoads.c_str()},
      {"ldu", "Data Movement: ldu", decode_ld, "global v2 v4"},
      {"st", "Data Movement: st", decode_st, kStores.c_str()},
      {"cvta", "Data Movement: cvta", decode_cvta,
       "to global local shared shared::cta shared::cluster const param param::entry"},
      {"isspacep", "Data Movement: isspacep", decode_isspacep,
       "global local shared shared::cta shared::cluster param param::entry"},
      {"mapa", "Data Movement: mapa", decode_mapa, "shared::cluster"},
      {"getctarank", "Data Movement: getctarank", decode_getctarank, "shared::cluster"},
      {"prefetch", "Data Movement: prefetch", decode_hint,
       "global local param const tensormap L1 L2 L2::evict_last L2::evict_normal"},
      {"prefetchu", "Data Movement: prefetchu", decode_hint, "L1"},
      {"applypriority", "Data Movement: applypriority", decode_hint, "global L2::evict_normal"},
      {"discard", "Data Movement: discard", decode_hint, "global L2"},
      {"createpolicy", "Data Movement: createpolicy", decode_createpolicy,
       "fractional range cvt global L2 L2::evict_last L2::evict_normal L2::evict_first L2::evict_unchanged"},
  };
}

}  // namespace gnaforge::emulator
