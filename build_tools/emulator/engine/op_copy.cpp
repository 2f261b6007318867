// PTX ISA: Data Movement and Conversion Instructions: Asynchronous copy (cp.async, bulk copies, tensor copies).
#include <array>
#include <cstring>

#include "formats.h"
#include "opcodes.h"
#include "reduction.h"
#include "tensor_map.h"

namespace gnaforge::emulator {
namespace {

using GroupQueue = std::deque<std::shared_ptr<AsyncGroup>>;

AsyncGroup& open_group(GroupQueue& groups) {
  if (groups.empty() || groups.back()->committed) groups.push_back(std::make_shared<AsyncGroup>());
  return *groups.back();
}

/// A copy's bytes are there, and its mbarrier knows: who waits for that phase has seen them.
void landed(Cta& cta, uint32_t address, uint32_t size, uint32_t barrier, int64_t bytes, Clock seen) {
  Mbarrier& at = cta.mbarriers.at(barrier);
  seen.at[at.agent] = std::max(seen.at[at.agent], at.arrived.at[at.agent]) + 1;
  cta.shared.end_async_write(address, size, {seen.at[at.agent], at.agent});
  note(Event::complete, barrier, at.phase);
  cta.mbarriers.complete(barrier, bytes, seen);
}

// --- tensor copies

struct TensorCopy {
  TensorMap map;
  std::array<int32_t, kMaxRank> origin{};
  uint32_t shared = 0;

  /// The swizzle permutes within 128-byte lines, so whole lines are in use.
  uint32_t shared_bytes() const { return map.swizzle ? (map.box_bytes() + 127) / 128 * 128 : map.box_bytes(); }
  /// Calls f(offset in the row, shared address, bytes) for the row's 16-byte chunks.
  template <class F>
  void each_chunk(uint32_t row, F&& f) const {
    uint32_t bytes = map.row_bytes();
    for (uint32_t at = 0; at < bytes; at += kGranule)
      f(at, map.swizzled(shared + row * bytes + at), std::min(kGranule, bytes - at));
  }
};

TensorCopy tensor_copy(Warp& warp, const Instruction& in, const Operand& tensor, const Operand& shared, int lane) {
  Cta& cta = warp.cta;
  TensorCopy copy;
  uint64_t address = warp.address(tensor, lane);
  if (address % 64) throw EmulationError("the tensor map's address " + hex(address) + " is not aligned to 64 bytes");
  copy.map = decode_tensor_map(cta.object(address, kTensorMapBytes));
  if (static_cast<int>(copy.map.rank) != in.detail[0])
    throw EmulationError("a copy of rank " + std::to_string(in.detail[0]) + " with a tensor map of rank " +
                         std::to_string(copy.map.rank));
  const std::vector<Operand>& coordinates = tensor.parts.at(0).parts;
  if (coordinates.size() != copy.map.rank)
    throw EmulationError(std::to_string(coordinates.size()) + " coordinates for rank " + std::to_string(copy.map.rank));
  for (size_t i = 0; i < coordinates.size(); ++i)
    copy.origin[i] = static_cast<int32_t>(warp.bits(coordinates[i], lane));
  copy.shared = cta.shared_address(Space::shared, warp.address(shared, lane) & ~kWindowMask);
  if (copy.shared % 128)
    throw EmulationError("the box's shared address " + hex(copy.shared) + " is not aligned to 128 bytes");
  copy.map.each_row(copy.origin.data(), [&](uint32_t, uint64_t global, uint32_t, uint32_t count) {
    if (!count) return;
    uint64_t bytes = uint64_t{count} * copy.map.element_size();
    if (in.space == Space::shared)
      cta.check_bulk_load(warp, global, bytes);
    else
      cta.check_bulk_store(global, bytes, warp.clock, in.parts[1] == "reduce");
  });
  return copy;
}

void fill(std::vector<uint8_t>& row, const TensorMap& map) {
  std::fill(row.begin(), row.end(), uint8_t{0});
  if (!map.fill_nan) return;
  uint32_t size = map.element_size();
  uint64_t nan = size == 2 ? 0x7fff : size == 4 ? 0x7fffffff : 0x7fffffffffffffff;
  for (size_t at = 0; at < row.size(); at += size) std::memcpy(row.data() + at, &nan, size);
}

Status load_tensor(Warp& warp, const Instruction& in, uint32_t mask) {
  Cta& cta = warp.cta;
  each_lane(warp, mask, [&](int lane) {
    if (in.detail[1] && warp.bits(in.args.at(3), lane) != 1)
      throw EmulationError("multicast to other CTAs in a cluster of one");
    TensorCopy copy = tensor_copy(warp, in, in.args[1], in.args[0], lane);
    uint32_t barrier = cta.shared_address(Space::shared, warp.address(in.args[2], lane) & ~kWindowMask);
    cta.check_signalled(warp, barrier);
    cta.shared.begin_async_write(copy.shared, copy.shared_bytes(), "bulk tensor load", warp.clock);
    Clock seen = warp.publish();
    cta.counters.async_load_bytes += copy.map.box_bytes();
    cta.submit([copy, barrier, seen, &cta] {
      std::vector<uint8_t> row(copy.map.row_bytes());
      uint32_t size = copy.map.element_size();
      copy.map.each_row(copy.origin.data(), [&](uint32_t index, uint64_t global, uint32_t first, uint32_t count) {
        fill(row, copy.map);
        if (count) std::memcpy(row.data() + first * size, reinterpret_cast<const void*>(global), size_t{count} * size);
        copy.each_chunk(index, [&](uint32_t at, uint32_t to, uint32_t bytes) {
          std::memcpy(cta.shared.data() + to, row.data() + at, bytes);
        });
      });
      landed(cta, copy.shared, copy.shared_bytes(), barrier, copy.map.box_bytes(), seen);
      cta.event();
    });
  });
  return Status::next;
}

/// Stores and reductions: first the shared memory is read, later the device memory is written.
Status store_tensor(Warp& warp, const Instruction& in, uint32_t mask) {
  Cta& cta = warp.cta;
  auto operation = static_cast<Reduction>(in.detail[1]);
  ++cta.bulk_stores;  // one for all lanes: CUTLASS's epilogues let a whole warp store the same box
  each_lane(warp, mask, [&](int lane) {
    auto thread = static_cast<uint16_t>(warp.thread(lane));
    TensorCopy copy = tensor_copy(warp, in, in.args[0], in.args[1], lane);
    cta.shared.begin_async_read(copy.shared, copy.shared_bytes(), thread, Reader::bulk_store, warp.clock,
                                {cta.bulk_stores, kBulkReadAgent}, [&](uint16_t of) { return cta.fences[of]; });
    AsyncGroup& group = open_group(cta.bulk_groups[thread]);
    std::shared_ptr<AsyncGroup> holder = cta.bulk_groups[thread].back();
    group.reads.push_back({copy.shared, copy.shared_bytes()});
    group.bulk_stores = cta.bulk_stores;
    group.origin = cta.origin();
    ++group.reads_pending;
    ++group.writes_pending;
    cta.counters.async_store_bytes += copy.map.box_bytes();
    cta.submit([copy, operation, holder, &cta] {
      auto box = std::make_shared<std::vector<uint8_t>>(copy.map.box_bytes());
      uint32_t rows = copy.map.rows();
      for (uint32_t index = 0; index < rows; ++index)
        copy.each_chunk(index, [&](uint32_t at, uint32_t from, uint32_t bytes) {
          std::memcpy(box->data() + index * copy.map.row_bytes() + at, cta.shared.data() + from, bytes);
        });
      --holder->reads_pending;
      cta.event();
      cta.submit([copy, operation, holder, box, &cta] {
        std::unique_lock<std::mutex> lock;
        if (cta.launch.atomics) lock = std::unique_lock<std::mutex>(*cta.launch.atomics);
        uint32_t size = copy.map.element_size();
        copy.map.each_row(copy.origin.data(), [&](uint32_t index, uint64_t global, uint32_t first, uint32_t count) {
          const uint8_t* from = box->data() + index * copy.map.row_bytes() + first * size;
          auto* to = reinterpret_cast<uint8_t*>(global);
          if (operation == Reduction::none) {
            if (count) std::memcpy(to, from, size_t{count} * size);
            return;
          }
          for (uint32_t i = 0; i < count; ++i) {
            uint64_t old = 0, value = 0;
            std::memcpy(&old, to + i * size, size);
            std::memcpy(&value, from + i * size, size);
            value = reduced(operation, copy.map.reduction_type(), old, value);
            std::memcpy(to + i * size, &value, size);
          }
        });
        --holder->writes_pending;
        cta.event();
      });
    });
  });
  return Status::next;
}

Status prefetch(Warp& warp, const Instruction& in, uint32_t mask) {
  each_lane(warp, mask,
            [&](int lane) { decode_tensor_map(warp.cta.object(warp.address(in.args[0], lane), kTensorMapBytes)); });
  return Status::next;
}

// --- bulk copies without a tensor map

void check_bulk(uint64_t a, uint64_t b, uint32_t size) {
  if (a % 16 || b % 16)
    throw EmulationError("bulk copy between " + hex(a) + " and " + hex(b) + ": both must be aligned to 16 bytes");
  if (size == 0 || size % 16)
    throw EmulationError("bulk copy of " + std::to_string(size) + " bytes, which is no multiple of 16");
}

/// Into shared memory, from device memory or from this CTA's own.
Status bulk_load(Warp& warp, const Instruction& in, uint32_t mask) {
  Cta& cta = warp.cta;
  bool from_shared = in.detail[1];
  each_lane(warp, mask, [&](int lane) {
    uint32_t to = cta.shared_address(Space::shared, warp.address(in.args[0], lane) & ~kWindowMask);
    uint64_t from = warp.address(in.args[1], lane);
    auto size = static_cast<uint32_t>(warp.bits(in.args[2], lane));
    uint32_t barrier = cta.shared_address(Space::shared, warp.address(in.args[3], lane) & ~kWindowMask);
    check_bulk(to, from, size);
    cta.check_signalled(warp, barrier);
    auto thread = static_cast<uint16_t>(warp.thread(lane));
    if (from_shared) {
      from = cta.shared_address(Space::shared, from & ~kWindowMask);
      cta.shared.begin_async_read(static_cast<uint32_t>(from), size, thread, Reader::bulk_store, warp.clock,
                                  warp.epoch(), [&](uint16_t of) { return cta.fences[of]; });
    } else {
      cta.check_bulk_load(warp, from, size);
    }
    cta.shared.begin_async_write(to, size, "bulk copy", warp.clock);
    Clock seen = warp.publish();
    cta.counters.async_load_bytes += size;
    cta.submit([=, &cta] {
      const void* source = from_shared ? cta.shared.data() + from : reinterpret_cast<const void*>(from);
      std::memcpy(cta.shared.data() + to, source, size);
      if (from_shared) cta.shared.end_async_read(static_cast<uint32_t>(from), size, Reader::bulk_store);
      landed(cta, to, size, barrier, size, seen);
      cta.event();
    });
  });
  return Status::next;
}

Status bulk_store(Warp& warp, const Instruction& in, uint32_t mask) {
  Cta& cta = warp.cta;
  auto operation = static_cast<Reduction>(in.detail[1]);
  Type type = in.type;
  ++cta.bulk_stores;
  each_lane(warp, mask, [&](int lane) {
    uint64_t to = warp.address(in.args[0], lane);
    uint32_t from = cta.shared_address(Space::shared, warp.address(in.args[1], lane) & ~kWindowMask);
    auto size = static_cast<uint32_t>(warp.bits(in.args[2], lane));
    check_bulk(to, from, size);
    cta.check_bulk_store(to, size, warp.clock, operation != Reduction::none);
    auto thread = static_cast<uint16_t>(warp.thread(lane));
    cta.shared.begin_async_read(from, size, thread, Reader::bulk_store, warp.clock, {cta.bulk_stores, kBulkReadAgent},
                                [&](uint16_t of) { return cta.fences[of]; });
    AsyncGroup& group = open_group(cta.bulk_groups[thread]);
    std::shared_ptr<AsyncGroup> holder = cta.bulk_groups[thread].back();
    group.reads.push_back({from, size});
    group.bulk_stores = cta.bulk_stores;
    group.origin = cta.origin();
    ++group.reads_pending;
    ++group.writes_pending;
    cta.counters.async_store_bytes += size;
    cta.submit([=, &cta] {
      auto bytes = std::make_shared<std::vector<uint8_t>>(cta.shared.data() + from, cta.shared.data() + from + size);
      --holder->reads_pending;
      cta.event();
      cta.submit([=, &cta] {
        std::unique_lock<std::mutex> lock;
        if (cta.launch.atomics) lock = std::unique_lock<std::mutex>(*cta.launch.atomics);
        auto* target = reinterpret_cast<uint8_t*>(to);
        if (operation == Reduction::none) {
          std::memcpy(target, bytes->data(), size);
        } else {
          auto width = static_cast<uint32_t>(size_of(type));
          for (uint32_t at = 0; at < size; at += width) {
            uint64_t old = 0, value = 0;
            std::memcpy(&old, target + at, width);
            std::memcpy(&value, bytes->data() + at, width);
            value = reduced(operation, type, old, value);
            std::memcpy(target + at, &value, width);
          }
        }
        --holder->writes_pending;
        cta.event();
      });
    });
  });
  return Status::next;
}

// --- groups

Status commit(Warp& warp, const Instruction& in, uint32_t mask) {
  auto& all = in.detail[0] ? warp.cta.bulk_groups : warp.cta.copy_groups;
  each_lane(warp, mask, [&](int lane) { open_group(all[static_cast<size_t>(warp.thread(lane))]).committed = true; });
  return Status::next;
}

/// detail: 0 whether bulk, 1 whether only reads, 2 whether all (cp.async.wait_all).
Status wait_groups(Warp& warp, const Instruction& in, uint32_t mask) {
  Cta& cta = warp.cta;
  auto keep = in.detail[2] ? 0 : static_cast<size_t>(in.args[0].value);
  bool reads_only = in.detail[1];
  auto& all = in.detail[0] ? cta.bulk_groups : cta.copy_groups;
  auto waited = [&](GroupQueue& groups) {
    if (in.detail[2] && !groups.empty()) groups.back()->committed = true;
    size_t committed = 0;
    for (const auto& group : groups) committed += group->committed;
    return committed > keep ? committed - keep : 0;
  };
  bool ready = true;
  each_lane(warp, mask, [&](int lane) {
    GroupQueue& groups = all[static_cast<size_t>(warp.thread(lane))];
    size_t count = waited(groups);
    for (size_t i = 0; i < count; ++i)
      ready &= groups[i]->reads_pending == 0 && (reads_only || groups[i]->writes_pending == 0);
  });
  if (!ready) return Status::blocked;
  each_lane(warp, mask, [&](int lane) {
    GroupQueue& groups = all[static_cast<size_t>(warp.thread(lane))];
    size_t count = waited(groups);
    for (size_t i = 0; i < count; ++i) {
      for (const auto& range : groups[i]->reads)
        cta.shared.end_async_read(range.first, range.second, Reader::bulk_store);
      groups[i]->reads.clear();
      auto see = [&](size_t agent, uint32_t stamp) { warp.clock.at[agent] = std::max(warp.clock.at[agent], stamp); };
      see(kBulkReadAgent, groups[i]->bulk_stores);
      if (!reads_only) see(kBulkStoreAgent, groups[i]->bulk_stores);
      if (warp.copy_agent) see(warp.copy_agent, groups[i]->copies);
    }
    // A group that has only been read from still has to be waited for as a whole, so it stays in the count.
    while (!reads_only && count-- > 0) groups.pop_front();
  });
  return Status::next;
}

// --- cp.async of 4, 8 or 16 bytes

Status copy_small(Warp& warp, const Instruction& in, uint32_t mask) {
  Cta& cta = warp.cta;
  if (!warp.copy_agent) warp.copy_agent = cta.mbarriers.new_agent();
  Epoch by{++warp.copies, warp.copy_agent};
  each_lane(warp, mask, [&](int lane) {
    uint32_t to = cta.shared_address(Space::shared, warp.address(in.args[0], lane) & ~kWindowMask);
    uint64_t from = warp.address(in.args[1], lane);
    auto size = static_cast<uint32_t>(in.args[2].value);
    uint32_t used = size;
    if (in.args.size() > 3 && in.args[3].type != Type::b64 && in.args[3].type != Type::u64) {
      bool predicate = in.args[3].is_register() && in.args[3].type == Type::pred;
      used = predicate ? (warp.bits(in.args[3], lane) ? 0 : size) : static_cast<uint32_t>(warp.bits(in.args[3], lane));
    }
    if (size != 4 && size != 8 && size != 16) throw EmulationError("cp.async of " + std::to_string(size) + " bytes");
    if (to % size || from % size)
      throw EmulationError("cp.async of " + std::to_string(size) + " bytes from " + hex(from) + " to " + hex(to) +
                           " is not aligned");
    if (used > size)
      throw EmulationError("cp.async with a source size of " + std::to_string(used) + " of " + std::to_string(size));
    if (used) cta.check_bulk_load(warp, from, used);
    auto thread = static_cast<uint16_t>(warp.thread(lane));
    cta.shared.write(to, size, cta.clock, thread, warp.clock, by);
    AsyncGroup& group = open_group(cta.copy_groups[thread]);
    std::shared_ptr<AsyncGroup> holder = cta.copy_groups[thread].back();
    group.copies = by.stamp;
    ++group.writes_pending;
    cta.counters.async_load_bytes += used;
    cta.submit([=, &cta] {
      // Small copies may share 16 bytes, so they are not tracked as landing.
      uint8_t* target = cta.shared.overwrite(to, size, cta.clock, thread);
      std::memset(target, 0, size);
      if (used) std::memcpy(target, reinterpret_cast<const void*>(from), used);
      --holder->writes_pending;
      bool all_landed = true;
      for (const auto& other : cta.copy_groups[thread]) all_landed &= other->writes_pending == 0;
      if (all_landed) {
        auto waiting = std::move(cta.after_copies[thread]);
        cta.after_copies[thread].clear();
        for (auto& action : waiting) action();
      }
      cta.event();
    });
  });
  return Status::next;
}

/// cp.async.mbarrier.arrive: an arrival once this thread's earlier cp.async have landed.
Status arrive_after_copies(Warp& warp, const Instruction& in, uint32_t mask) {
  Cta& cta = warp.cta;
  each_lane(warp, mask, [&](int lane) {
    auto thread = static_cast<size_t>(warp.thread(lane));
    uint32_t barrier = cta.shared_address(in.space, warp.address(in.args[0], lane));
    if (!in.detail[0]) ++cta.mbarriers.at(barrier).pending;
    Clock seen = warp.publish();
    if (warp.copy_agent) seen.at[warp.copy_agent] = std::max(seen.at[warp.copy_agent], warp.copies);
    auto act = [&cta, barrier, seen] {
      if (cta.mbarriers.arrive(barrier, 1, seen)) cta.event();
    };
    bool landed = true;
    for (const auto& group : cta.copy_groups[thread]) landed &= group->writes_pending == 0;
    if (landed)
      act();
    else
      cta.after_copies[thread].push_back(act);
  });
  return Status::next;
}

void decode_cp(Instruction& in) {
  bool bulk = in.has("bulk");
  if (in.has("commit_group") || in.has("wait_group") || in.has("wait_all")) {
    in.detail[0] = bulk;
    in.detail[1] = in.has("read");
    in.detail[2] = in.has("wait_all");
    in.run = in.has("commit_group") ? commit : wait_groups;
    return;
  }
  if (!bulk) {
    if (in.has("arrive")) {
      in.detail[0] = in.has("noinc");
      in.run = arrive_after_copies;
    } else if (in.mode() == "async" && (in.has("ca") || in.has("cg"))) {
      expect_count(in, 3, 5);
      in.run = copy_small;
    }
    return;
  }
  bool reduce = in.mode() == "reduce";
  size_t global = 0, shared = 0, shared_count = 0;
  for (size_t i = 0; i < in.parts.size(); ++i) {
    if (in.parts[i] == "global") global = i;
    if (in.parts[i].compare(0, 8, "shared::") == 0) {
      if (!shared) shared = i;
      ++shared_count;
    }
  }
  bool into_shared = shared && (shared < global || !global);
  int operation = static_cast<int>(reduce ? reduction_named(in.parts) : Reduction::none);
  if (in.has("prefetch")) {
    if (in.has("tensor")) in.run = prefetch;
    return;
  }
  if (in.has("tensor")) {
    for (const std::string& part : in.parts)
      if (part.size() == 2 && part[1] == 'd') in.detail[0] = part[0] - '0';
    if (into_shared) {
      in.detail[1] = in.has("multicast::cluster");
      expect_count(in, 3, 6);
      in.run = load_tensor;
    } else {
      in.detail[1] = operation;
      expect_count(in, 2, 3);
      in.run = store_tensor;
    }
  } else if (into_shared && !reduce) {
    in.detail[1] = shared_count == 2;
    if (in.has("multicast::cluster")) return;
    expect_count(in, 4, 5);
    in.run = bulk_load;
  } else if (global && global < shared) {
    in.detail[1] = operation;
    expect_count(in, 3, 4);
    in.run = bulk_store;
  }
}

}  // namespace

std::vector<Opcode> copy_opcodes() {
  return {{"cp", "Data Movement: asynchronous copy", decode_cp,
           "async bulk reduce prefetch tensor 1d 2d 3d 4d 5d tile cta_group::1 commit_group bulk_group wait_group "
           "wait_all read "
           "mbarrier mbarrier::complete_tx::bytes arrive noinc multicast::cluster add min max inc dec and or xor noftz "
           "ca cg "
           "global shared shared::cta shared::cluster L2 L2::cache_hint L2::64B L2::128B L2::256B"}};
}

}  // namespace gnaforge::emulator
