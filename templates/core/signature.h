// All that choosing a kernel can depend on, as numbers: the memo's key. No torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "gnaforge/abi.h"

namespace gnaforge {

// A call's numbers are taken whole, as bytes, so that no field can be left out, and compared as bytes, so there is no
// padding. Pointers come last in gnaforge_args: what they point to is taken in their stead.
static_assert(sizeof(gnaforge_problem) == 2 * sizeof(int32_t) + 5 * sizeof(int64_t) + sizeof(double) +
                                              (12 * GNAFORGE_MAX_RANK + GNAFORGE_MAX_EXTRA) * sizeof(int64_t),
              "gnaforge_problem has no padding");
static_assert(sizeof(gnaforge_args) == offsetof(gnaforge_args, tensors) + 3 * sizeof(void*) &&
                  offsetof(gnaforge_args, tensors) == 6 * sizeof(uint32_t) + 2 * sizeof(uint64_t),
              "gnaforge_args: numbers without padding, then the pointers to tensors, problem and host");
static_assert(sizeof(gnaforge_tensor) == 2 * sizeof(uint32_t) + sizeof(void*) +
                                             (2 + GNAFORGE_MAX_RANK) * sizeof(int64_t) &&
                  offsetof(gnaforge_tensor, batch_stride) == 2 * sizeof(uint32_t) + sizeof(void*),
              "gnaforge_tensor: its strides are its end");
static_assert(sizeof(gnaforge_host) == 2 * sizeof(int32_t) + sizeof(void*), "gnaforge_host: threads is its number");

class Signature {
 public:
  /// Throws std::length_error for a call with more tensors than there are roles.
  Signature(uint64_t generation, const gnaforge_args& args) {
    append(&generation, 1);
    append(&args, args_words);
    append(args.problem, problem_words);
    const int64_t threads = args.host ? args.host->threads : 1;
    append(&threads, 1);
    for (uint32_t role = 0; role < args.roles; ++role) {
      const gnaforge_tensor* const tensor = args.tensors[role];
      if (!tensor) continue;
      const uint64_t alignment = reinterpret_cast<uintptr_t>(tensor->data) % 128;  // no kernel looks at more of it
      const uint64_t facts = uint64_t{role} << 48 | alignment << 32 | tensor->dtype;
      append(&facts, 1);
      append(&tensor->batch_stride, stride_words);
    }
  }
  Signature(const Signature& other) : used_(other.used_) { std::memcpy(words_, other.words_, used_ * sizeof(uint64_t)); }

  bool operator==(const Signature& other) const {
    return used_ == other.used_ && std::memcmp(words_, other.words_, used_ * sizeof(uint64_t)) == 0;
  }

  /// Four sums in turn: one would wait for a multiplication at every word.
  uint64_t hash() const {
    uint64_t lanes[4] = {0x9e3779b97f4a7c15u, 0xbf58476d1ce4e5b9u, 0x94d049bb133111ebu, 0xd6e8feb86659fd93u};
    size_t i = 0;
    for (; i + 4 <= used_; i += 4)
      for (size_t lane = 0; lane < 4; ++lane) lanes[lane] = mix(lanes[lane], words_[i + lane]);
    for (; i < used_; ++i) lanes[0] = mix(lanes[0], words_[i]);
    uint64_t sum = 0;
    for (const uint64_t lane : lanes) sum = mix(sum, lane ^ lane >> 32);
    return sum ^ sum >> 32;
  }

 private:
  static constexpr size_t args_words = offsetof(gnaforge_args, tensors) / sizeof(uint64_t);
  static constexpr size_t problem_words = sizeof(gnaforge_problem) / sizeof(uint64_t);
  static constexpr size_t stride_words = 2 + GNAFORGE_MAX_RANK;
  static constexpr size_t capacity = 2 + args_words + problem_words + GNAFORGE_ROLES * (1 + stride_words);

  static uint64_t mix(uint64_t sum, uint64_t word) { return (sum ^ word) * 0x9fb21c651e98df25u; }

  void append(const void* from, size_t words) {
    if (words > capacity - used_) throw std::length_error("gnaforge: a call's signature is too long");
    std::memcpy(words_ + used_, from, words * sizeof(uint64_t));
    used_ += words;
  }

  size_t used_ = 0;
  uint64_t words_[capacity];  // only those in use are ever written or read
};

}  // namespace gnaforge
