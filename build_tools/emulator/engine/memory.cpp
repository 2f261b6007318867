#include "memory.h"

#include <cstdio>
#include <cstring>
#include <fstream>

namespace gnaforge::emulator {

void DeviceMemory::add(uint64_t address, uint64_t size, const std::string& name) { ranges_[address] = {size, name}; }

void DeviceMemory::remove(uint64_t address) { ranges_.erase(address); }

bool DeviceMemory::is_mapped(uint64_t address, uint64_t size) const {
  std::lock_guard<std::mutex> lock(mapping_);
  auto inside = [&] {
    auto after = mapped_.upper_bound(address);
    return after != mapped_.begin() && address + size <= std::prev(after)->second;
  };
  if (inside()) return true;
  mapped_.clear();
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    unsigned long long begin, end;
    char read, write;
    if (std::sscanf(line.c_str(), "%llx-%llx %c%c", &begin, &end, &read, &write) != 4 || read != 'r' || write != 'w')
      continue;
    // Neighbouring mappings are one range to a kernel.
    if (!mapped_.empty() && mapped_.rbegin()->second == begin)
      mapped_.rbegin()->second = end;
    else
      mapped_[begin] = end;
  }
  return inside();
}

void DeviceMemory::check(uint64_t address, uint64_t size) const {
  auto after = ranges_.upper_bound(address);
  std::string nearest = "; no device memory lies below it";
  if (after != ranges_.begin()) {
    auto range = std::prev(after);
    uint64_t start = range->first, end = start + range->second.size;
    if (address + size <= end) return;
    nearest = "; " + range->second.name + " (" + std::to_string(range->second.size) + " bytes at " + hex(start) +
              ") ends " + (address >= end ? std::to_string(address - end) + " bytes before it" : "inside it");
  }
  if (mapped_too_ && is_mapped(address, size)) return;
  if (after != ranges_.end() && after->first - address < 4096)
    nearest += "; " + after->second.name + " begins " + std::to_string(after->first - address) + " bytes after it";
  throw EmulationError("global memory out of bounds: " + std::to_string(size) + " bytes at " + hex(address) + nearest);
}

SharedMemory::SharedMemory(uint32_t end, bool checks)
    : checks_(checks),
      bytes_((end + kGranule - 1) / kGranule * kGranule),
      valid_(bytes_.size()),
      granules_(bytes_.size() / kGranule),
      accesses_(bytes_.size() / 4) {
  std::memset(bytes_.data(), 0xcd, bytes_.size());  // never zero, which would hide a missing initialisation
}

void SharedMemory::mark_valid(uint32_t address, uint32_t size) { std::memset(valid_.data() + address, 1, size); }

void SharedMemory::set_object(uint32_t address, bool present) {
  check_bounds(address, 8, "mbarrier");
  uint8_t bit = address % kGranule ? 2 : 1;
  uint8_t& objects = granules_[address / kGranule].objects;
  objects = present ? objects | bit : objects & ~bit;
  mark_valid(address, 8);
}

void SharedMemory::check_objects(uint32_t granule, uint32_t address, uint32_t size) const {
  for (uint32_t half = 0; half < 2; ++half) {
    uint32_t object = granule * kGranule + 8 * half;
    if ((granules_[granule].objects >> half & 1) && address < object + 8 && object < address + size)
      throw EmulationError("write to " + hex(address) + " overwrites the mbarrier at " + hex(object));
  }
}

void SharedMemory::check_valid(uint32_t address, uint32_t size) const {
  if (!checks_) return;
  uint32_t i = 0;
  const uint8_t* valid = valid_.data() + address;
  for (; i + 8 <= size; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, valid + i, 8);
    if (eight != 0x0101010101010101u) break;
  }
  for (; i < size; ++i)
    if (!valid[i])
      throw EmulationError("read of uninitialised shared memory: byte " + hex(address + i) + " of " +
                           std::to_string(size) + " bytes at " + hex(address));
}

void SharedMemory::fail_bounds(uint32_t address, uint32_t size, const char* what) const {
  throw EmulationError("shared memory out of bounds: " + std::string(what) + " of " + std::to_string(size) +
                       " bytes at " + hex(address) + ", the CTA owns " + hex(kSharedStart) + " to " +
                       hex(bytes_.size()));
}

void SharedMemory::fail_landing(uint32_t address, uint32_t size, const char* what) const {
  throw EmulationError(std::string(what) + " of shared memory (" + std::to_string(size) + " bytes at " + hex(address) +
                       ") into which an asynchronous copy has not finished writing");
}

void SharedMemory::fail_readers(uint32_t address, uint32_t size, const char* what) const {
  bool mma = false;
  for (uint32_t g = address / kGranule; g <= (address + size - 1) / kGranule; ++g) mma |= granules_[g].readers[0] != 0;
  throw EmulationError(
      std::string(what) + " to shared memory (" + std::to_string(size) + " bytes at " + hex(address) + ") that " +
      (mma ? "an MMA may still read: its completion was not waited for"
           : "a bulk store may still read: cp.async.bulk.wait_group.read by its thread has to come first"));
}

void SharedMemory::fail_race(uint32_t address, const char* what, Epoch other, const char* how) const {
  throw EmulationError("race: " + std::string(what) + " of shared memory at " + hex(address) + ", which " +
                       name_of_agent(other.agent) + " has " + how +
                       " without any barrier or phase between that this warp has waited for");
}

void SharedMemory::fail_proxy(uint32_t address, uint16_t writer, const char* what) const {
  throw EmulationError(std::string(what) + " of shared memory at " + hex(address) +
                       " through the async proxy, but thread " + std::to_string(writer) +
                       " wrote it through the generic proxy and no fence.proxy.async came between");
}

}  // namespace gnaforge::emulator
