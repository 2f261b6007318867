// Tensor memory of one CTA: 128 lanes of 512 columns of 32 bits, and what asynchronous work does in it.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "clocks.h"
#include "types.h"

namespace gnaforge::emulator {

constexpr uint32_t kTensorLanes = 128, kTensorColumns = 512;

/// A rectangle of tensor memory.
struct TensorRegion {
  uint32_t lane, lanes, column, columns;
};

class TensorMemory {
 public:
  /// `fences`: accesses of different warps are ordered only through tcgen05.fence on both sides.
  explicit TensorMemory(bool fences);

  // tcgen05.alloc and dealloc. `allocate` returns false if the columns are not free now.
  // `where` says who allocates, for messages.
  bool allocate(uint32_t columns, uint32_t& address, const std::string& where);
  /// `early`: work there may go on, and the columns stay.
  void deallocate(uint32_t address, uint32_t columns, bool early, const Clock& clock, Epoch by);
  void relinquish() { may_allocate_ = false; }
  void check_end() const;

  /// Throws unless the region lies in allocated columns.
  void check(const TensorRegion& region, const char* what) const;
  void check_written(const TensorRegion& region, const char* what) const;
  void mark_written(const TensorRegion& region);
  float* row(uint32_t lane, uint32_t column) { return &cells_[lane * kTensorColumns + column]; }

  // Who uses what, per quarter of the lanes and column.
  void begin_load(const TensorRegion& region, const TensorAccess& access);
  void end_load(const TensorRegion& region) { count(region, &Use::loads, -1); }
  void begin_store(const TensorRegion& region, const TensorAccess& access);
  void end_store(const TensorRegion& region) { count(region, &Use::stores, -1); }
  /// The same by tcgen05.wait: counts as accessed until now, so that what was released since the issue doesn't cover
  /// it.
  void wait_load(const TensorRegion& region, const TensorAccess& access);
  void wait_store(const TensorRegion& region, const TensorAccess& access);
  void begin_mma(const TensorRegion& region, bool writes, const TensorAccess& access);
  void end_mma(const TensorRegion& region) { count(region, &Use::mmas, -1); }

  uint32_t issued = 0;  // MMAs so far: the tensor core's count
  /// What a thread has issued since its last tcgen05.commit, which covers no other thread's.
  struct Issued {
    uint32_t last = 0;                            // by the tensor core's count
    std::vector<std::function<void()>> releases;  // of regions and shared memory in use, once the commit arrives
  };
  std::map<int, Issued> issued_by;  // thread

 private:
  struct Use {
    int16_t loads = 0, stores = 0, mmas = 0;
    Accesses last, fenced;
  };
  void count(const TensorRegion& region, int16_t Use::* what, int by);
  void check_order(const TensorRegion& region, bool writes, const TensorAccess& access, const char* what);
  /// The access, of those that `before` has of each quarter and column, that it races with, if any.
  const Epoch* race(Accesses& before, bool writes, const Clock& clock, Epoch by, bool& was_read);
  bool any(const TensorRegion& region, int16_t Use::* what) const;

  const bool fences_;
  std::vector<float> cells_;
  std::vector<uint8_t> written_;
  std::vector<Use> uses_;  // 4 x 512
  ReaderPool readers_;
  std::vector<uint32_t> allocation_;            // per column: size of the allocation that starts here, or kInside, or 0
  std::map<uint32_t, std::string> allocators_;  // by first column
  bool may_allocate_ = true;
  bool freed_early_ = false;
};

}  // namespace gnaforge::emulator
