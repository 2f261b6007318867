#include "tensor_memory.h"

#include <algorithm>

#include "recording.h"

namespace gnaforge::emulator {

namespace {
constexpr uint32_t kInside = ~0u;

std::string describe(const TensorRegion& r) {
  return "lanes " + std::to_string(r.lane) + ".." + std::to_string(r.lane + r.lanes - 1) + ", columns " +
         std::to_string(r.column) + ".." + std::to_string(r.column + r.columns - 1);
}
}  // namespace

TensorMemory::TensorMemory(bool fences)
    : fences_(fences),
      cells_(kTensorLanes * kTensorColumns),
      written_(kTensorLanes * kTensorColumns),
      uses_(4 * kTensorColumns),
      allocation_(kTensorColumns) {}

bool TensorMemory::allocate(uint32_t columns, uint32_t& address, const std::string& where) {
  if (columns < 32 || columns > 512 || (columns & (columns - 1)))
    throw EmulationError("tcgen05.alloc of " + std::to_string(columns) +
                         " columns, which is no power of two in 32..512");
  if (!may_allocate_) throw EmulationError("tcgen05.alloc after tcgen05.relinquish_alloc_permit");
  for (uint32_t start = 0; start + columns <= kTensorColumns; start += columns) {
    if (std::any_of(&allocation_[start], &allocation_[start] + columns, [](uint32_t a) { return a != 0; })) continue;
    std::fill(&allocation_[start], &allocation_[start] + columns, kInside);
    allocation_[start] = columns;
    allocators_[start] = where;
    address = start;
    for (uint32_t quarter = 0; quarter < 4; ++quarter)
      for (uint32_t column = start; column < start + columns; ++column)
        for (Accesses Use::* of : {&Use::last, &Use::fenced})
          readers_.overwrite(uses_[quarter * kTensorColumns + column].*of, {});
    for (uint32_t lane = 0; lane < kTensorLanes; ++lane)
      std::fill_n(&written_[lane * kTensorColumns + start], columns, uint8_t{0});
    return true;
  }
  return false;
}

void TensorMemory::deallocate(uint32_t address, uint32_t columns, bool early, const Clock& clock, Epoch by) {
  if (address >= kTensorColumns || allocation_[address] != columns)
    throw EmulationError("tcgen05.dealloc of " + std::to_string(columns) + " columns at " + hex(address) +
                         ", which tcgen05.alloc did not give");
  if (early) {
    freed_early_ = true;
    return;
  }
  TensorRegion all{0, kTensorLanes, address, columns};
  if (any(all, &Use::mmas) || any(all, &Use::loads) || any(all, &Use::stores))
    throw EmulationError("tcgen05.dealloc of " + describe(all) + " while work there is not complete: " +
                         (any(all, &Use::mmas) ? "an MMA whose tcgen05.commit has not arrived"
                                               : "a load or store that was not waited for"));
  Clock everything;  // dealloc is synchronous
  everything.at.fill(~0u);
  check_order(all, true, {clock, everything, by, {}}, "tcgen05.dealloc");
  std::fill_n(&allocation_[address], columns, 0u);
}

void TensorMemory::check_end() const {
  for (uint32_t column = 0; column < kTensorColumns; ++column)
    if (allocation_[column] && !freed_early_)
      throw EmulationError(allocators_.at(column) +
                           "the CTA ended without tcgen05.dealloc of the tensor memory at column " +
                           std::to_string(column));
}

void TensorMemory::check(const TensorRegion& r, const char* what) const {
  if (r.lane + r.lanes > kTensorLanes || r.column + r.columns > kTensorColumns)
    throw EmulationError(std::string(what) + " of tensor memory out of bounds: " + describe(r));
  for (uint32_t column = r.column; column < r.column + r.columns; ++column)
    if (!allocation_[column])
      throw EmulationError(std::string(what) + " of tensor memory that is not allocated: column " +
                           std::to_string(column));
}

void TensorMemory::check_written(const TensorRegion& r, const char* what) const {
  for (uint32_t lane = r.lane; lane < r.lane + r.lanes; ++lane)
    for (uint32_t column = r.column; column < r.column + r.columns; ++column)
      if (!written_[lane * kTensorColumns + column])
        throw EmulationError(std::string(what) + " of uninitialised tensor memory: lane " + std::to_string(lane) +
                             ", column " + std::to_string(column));
}

void TensorMemory::mark_written(const TensorRegion& r) {
  for (uint32_t lane = r.lane; lane < r.lane + r.lanes; ++lane)
    std::fill_n(&written_[lane * kTensorColumns + r.column], r.columns, uint8_t{1});
}

void TensorMemory::count(const TensorRegion& r, int16_t Use::* what, int by) {
  for (uint32_t quarter = r.lane / 32; quarter <= (r.lane + r.lanes - 1) / 32; ++quarter)
    for (uint32_t column = r.column; column < r.column + r.columns; ++column) {
      int16_t& uses = uses_[quarter * kTensorColumns + column].*what;
      uses = static_cast<int16_t>(uses + by);
    }
}

bool TensorMemory::any(const TensorRegion& r, int16_t Use::* what) const {
  for (uint32_t quarter = r.lane / 32; quarter <= (r.lane + r.lanes - 1) / 32; ++quarter)
    for (uint32_t column = r.column; column < r.column + r.columns; ++column)
      if (uses_[quarter * kTensorColumns + column].*what) return true;
  return false;
}

const Epoch* TensorMemory::race(Accesses& before, bool writes, const Clock& clock, Epoch by, bool& was_read) {
  was_read = false;
  return writes ? readers_.write(before, by, clock, was_read) : readers_.read(before, by, clock);
}

void TensorMemory::check_order(const TensorRegion& r, bool writes, const TensorAccess& access, const char* what) {
  for (uint32_t quarter = r.lane / 32; quarter <= (r.lane + r.lanes - 1) / 32; ++quarter) {
    note(writes ? Event::tensor_write : Event::tensor_read, quarter << 16 | r.column, r.columns);
    for (uint32_t column = r.column; column < r.column + r.columns; ++column) {
      Use& use = uses_[quarter * kTensorColumns + column];
      bool was_read = false, ordered = true;
      const Epoch* other = race(use.last, writes, access.clock, access.by, was_read);
      if (!other && fences_) {
        other = race(use.fenced, writes, access.fenced_clock, access.fenced_by, was_read);
        ordered = false;
      }
      if (!other) continue;
      std::string why = "without any barrier or phase between that this warp has waited for";
      if (!ordered)
        why = other->before(access.clock)
                  ? "with no tcgen05.fence::after_thread_sync between the wait for that and this"
                  : "with neither tcgen05.fence::before_thread_sync nor tcgen05.commit between that and its arrival";
      throw EmulationError("race: " + std::string(what) + " of tensor memory, lanes " + std::to_string(32 * quarter) +
                           ".." + std::to_string(32 * quarter + 31) + ", column " + std::to_string(column) +
                           ", which " + name_of_agent(other->agent) + " has " + (was_read ? "read" : "written") + " " +
                           why);
    }
  }
}

void TensorMemory::begin_load(const TensorRegion& r, const TensorAccess& access) {
  check(r, "tcgen05.ld");
  if (any(r, &Use::mmas))
    throw EmulationError("tcgen05.ld of " + describe(r) +
                         ", which an MMA uses whose tcgen05.commit has not arrived at its mbarrier");
  if (any(r, &Use::stores))
    throw EmulationError("tcgen05.ld of " + describe(r) + ", where tcgen05.st was not followed by tcgen05.wait::st");
  check_written(r, "tcgen05.ld");
  check_order(r, false, access, "tcgen05.ld");
  count(r, &Use::loads, 1);
}

void TensorMemory::begin_store(const TensorRegion& r, const TensorAccess& access) {
  check(r, "tcgen05.st");
  if (any(r, &Use::mmas))
    throw EmulationError("tcgen05.st to " + describe(r) +
                         ", which an MMA uses whose tcgen05.commit has not arrived at its mbarrier");
  if (any(r, &Use::loads))
    throw EmulationError("tcgen05.st to " + describe(r) + ", where tcgen05.ld was not followed by tcgen05.wait::ld");
  check_order(r, true, access, "tcgen05.st");
  count(r, &Use::stores, 1);
}

void TensorMemory::wait_load(const TensorRegion& r, const TensorAccess& access) {
  check_order(r, false, access, "tcgen05.ld");
  end_load(r);
}

void TensorMemory::wait_store(const TensorRegion& r, const TensorAccess& access) {
  check_order(r, true, access, "tcgen05.st");
  end_store(r);
}

void TensorMemory::begin_mma(const TensorRegion& r, bool writes, const TensorAccess& access) {
  check(r, "tcgen05.mma");
  if (any(r, &Use::stores))
    throw EmulationError("tcgen05.mma uses " + describe(r) + ", where tcgen05.st was not followed by tcgen05.wait::st");
  if (writes && any(r, &Use::loads))
    throw EmulationError("tcgen05.mma writes " + describe(r) +
                         ", where tcgen05.ld was not followed by tcgen05.wait::ld");
  check_order(r, writes, access, "tcgen05.mma");
  count(r, &Use::mmas, 1);
}

}  // namespace gnaforge::emulator
