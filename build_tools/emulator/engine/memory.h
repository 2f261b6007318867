// Device memory and shared memory, each with the checks that hardware leaves out.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "clocks.h"
#include "recording.h"
#include "running.h"
#include "types.h"

namespace gnaforge::emulator {

/// Device memory: ranges of host memory that a kernel may touch. Everything between them is a red zone.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(const DeviceMemory& other)
      : running(other.running), ranges_(other.ranges_), mapped_too_(other.mapped_too_) {}
  void add(uint64_t address, uint64_t size, const std::string& name);
  void remove(uint64_t address);
  /// Lets `check` pass for whatever the process has mapped.
  void allow_mapped() { mapped_too_ = true; }
  /// Throws unless all of [address, address + size) lies in one allocation.
  void check(uint64_t address, uint64_t size) const;

  std::shared_ptr<RunningWrites> running = std::make_shared<RunningWrites>();  // of launches on it

 private:
  struct Range {
    uint64_t size;
    std::string name;
  };
  bool is_mapped(uint64_t address, uint64_t size) const;

  std::map<uint64_t, Range> ranges_;
  bool mapped_too_ = false;
  mutable std::mutex mapping_;
  mutable std::map<uint64_t, uint64_t> mapped_;  // begin and end, as last read
};

/// Asynchronous use of shared memory is tracked in units of this many bytes, the least that bulk copies move.
constexpr uint32_t kGranule = 16;

/// Asynchronous work that reads shared memory until somebody has waited for it.
enum class Reader : uint8_t { mma, bulk_store };
inline const char* name_of(Reader reader) { return reader == Reader::mma ? "read by an MMA" : "read by a bulk store"; }

/// Shared memory of one CTA. Knows per byte what is initialised, and per 16 bytes which asynchronous work uses it.
class SharedMemory {
 public:
  SharedMemory(uint32_t end, bool checks);

  uint8_t* data() { return bytes_.data(); }
  uint32_t end() const { return static_cast<uint32_t>(bytes_.size()); }

  /// Changes whenever any byte may have changed.
  uint64_t version() const { return version_; }

  // `clock` is what the accessing warp has seen, `by` the access itself.

  /// A read by a thread: in bounds, initialised, and not being written by a bulk copy.
  const uint8_t* read(uint32_t address, uint32_t size, const Clock& clock, Epoch by) {
    check_bounds(address, size, "read");
    note(Event::read, address, size);
    for (uint32_t g = address / kGranule; g <= (address + size - 1) / kGranule; ++g)
      if (granules_[g].landing) fail_landing(address, size, "read");
    check_valid(address, size);
    check_read(address, size, clock, by, "read");
    return bytes_.data() + address;
  }
  /// A write by a thread: in bounds, and not while asynchronous work reads or writes there.
  uint8_t* write(uint32_t address, uint32_t size, uint64_t when, uint16_t thread, const Clock& clock, Epoch by) {
    check_bounds(address, size, "write");
    note(Event::write, address, size);
    uint8_t* bytes = overwrite(address, size, when, thread);
    check_write(address, size, clock, by);
    mark_valid(address, size);
    return bytes;
  }
  /// The bytes of a cp.async arrive, through the generic proxy. It was a `write` when issued.
  uint8_t* overwrite(uint32_t address, uint32_t size, uint64_t when, uint16_t thread) {
    ++version_;
    for (uint32_t g = address / kGranule; g <= (address + size - 1) / kGranule; ++g) {
      Granule& granule = granules_[g];
      if (granule.landing) fail_landing(address, size, "write");
      if (granule.busy()) fail_readers(address, size, "write");
      if (granule.objects) check_objects(g, address, size);
      granule.written = when;
      granule.writer = thread;
    }
    return bytes_.data() + address;
  }

  /// Asynchronous work starts reading: needs initialised bytes; `fence_of(thread)` tells when a thread last fenced.
  template <class FenceOf>
  void begin_async_read(uint32_t address, uint32_t size, uint16_t issuer, Reader who, const Clock& clock, Epoch reader,
                        FenceOf&& fence_of) {
    check_bounds(address, size, name_of(who));
    note(Event::async_read, address, size);
    for (uint32_t g = address / kGranule; g <= (address + size - 1) / kGranule; ++g) {
      Granule& granule = granules_[g];
      if (granule.landing) fail_landing(address, size, name_of(who));
      if (granule.written > fence_of(granule.writer) && granule.written > fence_of(issuer))
        fail_proxy(g * kGranule, granule.writer, name_of(who));
      ++granule.readers[static_cast<int>(who)];
    }
    check_valid(address, size);
    check_read(address, size, clock, reader, name_of(who));
  }
  void end_async_read(uint32_t address, uint32_t size, Reader who) {
    for (uint32_t g = address / kGranule; g <= (address + size - 1) / kGranule; ++g)
      --granules_[g].readers[static_cast<int>(who)];
  }
  /// Asynchronous work starts writing.
  void begin_async_write(uint32_t address, uint32_t size, const char* who, const Clock& clock) {
    check_bounds(address, size, who);
    note(Event::async_write, address, size);
    for (uint32_t g = address / kGranule; g <= (address + size - 1) / kGranule; ++g) {
      if (granules_[g].landing) fail_landing(address, size, who);
      if (granules_[g].busy()) fail_readers(address, size, who);
      granules_[g].landing = 1;
    }
    check_write(address, size, clock, {});
  }
  /// The bytes have landed.
  void end_async_write(uint32_t address, uint32_t size, Epoch writer) {
    note(Event::landed, address, size);
    ++version_;
    for (uint32_t w = address / 4; checks_ && w <= (address + size - 1) / 4; ++w)
      readers_.overwrite(accesses_[w], writer);
    for (uint32_t g = address / kGranule; g <= (address + size - 1) / kGranule; ++g) {
      granules_[g].landing = 0;
      granules_[g].written = 0;
    }
    mark_valid(address, size);
  }
  /// Whether an mbarrier object lies at `address`: threads may not write it by other means.
  void set_object(uint32_t address, bool present);
  void mark_valid(uint32_t address, uint32_t size);
  void check_bounds(uint32_t address, uint32_t size, const char* what) const {
    if (size == 0 || address < kSharedStart || uint64_t{address} + size > bytes_.size())
      fail_bounds(address, size, what);
  }

 private:
  struct Granule {
    uint64_t written = 0;  // when a thread last wrote it
    uint16_t writer = 0;
    uint16_t readers[2] = {0, 0};  // by kind
    bool busy() const { return (readers[0] | readers[1]) != 0; }
    uint8_t landing = 0;
    uint8_t objects = 0;  // bit 0: an mbarrier in the lower 8 bytes; bit 1: in the upper 8
  };
  void check_objects(uint32_t granule, uint32_t address, uint32_t size) const;
  void check_valid(uint32_t address, uint32_t size) const;
  void check_read(uint32_t address, uint32_t size, const Clock& clock, Epoch reader, const char* what) {
    if (!checks_) return;
    for (uint32_t w = address / 4; w <= (address + size - 1) / 4; ++w) {
      if (const Epoch* other = readers_.read(accesses_[w], reader, clock)) fail_race(w * 4, what, *other, "written");
    }
  }
  void check_write(uint32_t address, uint32_t size, const Clock& clock, Epoch writer) {
    if (!checks_) return;
    for (uint32_t w = address / 4; w <= (address + size - 1) / 4; ++w) {
      bool was_read;
      if (const Epoch* other = readers_.write(accesses_[w], writer, clock, was_read))
        fail_race(w * 4, "write", *other, was_read ? "read" : "written");
    }
  }
  [[noreturn]] void fail_race(uint32_t address, const char* what, Epoch other, const char* how) const;
  [[noreturn]] void fail_bounds(uint32_t address, uint32_t size, const char* what) const;
  [[noreturn]] void fail_landing(uint32_t address, uint32_t size, const char* what) const;
  [[noreturn]] void fail_readers(uint32_t address, uint32_t size, const char* what) const;
  [[noreturn]] void fail_proxy(uint32_t address, uint16_t writer, const char* what) const;

  const bool checks_;  // for races and uninitialised bytes
  uint64_t version_ = 0;
  std::vector<uint8_t> bytes_, valid_;
  std::vector<Granule> granules_;
  std::vector<Accesses> accesses_;  // per 4 bytes
  ReaderPool readers_;
};

}  // namespace gnaforge::emulator
