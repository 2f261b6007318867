// All that choosing a kernel can depend on, as numbers: the memo's key. No torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <type_traits>

#include "gnaforge/abi.h"

namespace gnaforge {

// Structs are taken whole, as bytes, so that no field can be left out; and compared as bytes, so they have no padding.
// In place of pointers stands what they point to.
static_assert(std::has_unique_object_representations_v<gnaforge_args> &&
                  std::has_unique_object_representations_v<gnaforge_host> &&
                  std::has_unique_object_representations_v<gnaforge_tensor>,
              "no padding");
static_assert(sizeof(gnaforge_problem) == 2 * sizeof(int32_t) + sizeof(double) +
                                              (5 + 12 * GNAFORGE_MAX_RANK + GNAFORGE_MAX_EXTRA) * sizeof(int64_t),
              "no padding: count a new field here");

class Signature {
 public:
  /// Throws std::length_error for a call with more tensors than there are roles.
  Signature(uint64_t generation, const gnaforge_args& args) {
    append(generation);
    uint64_t* const numbers = append(args);
    for (const size_t pointer :
         {offsetof(gnaforge_args, tensors), offsetof(gnaforge_args, problem), offsetof(gnaforge_args, host)})
      numbers[pointer / sizeof(uint64_t)] = 0;
    append(*args.problem);
    if (args.host) append(*args.host)[offsetof(gnaforge_host, parallel_for) / sizeof(uint64_t)] = 0;
    for (uint32_t role = 0; role < args.roles; ++role) {
      if (!args.tensors[role]) continue;
      uint64_t* const tensor = append(*args.tensors[role]);
      uint64_t& data = tensor[offsetof(gnaforge_tensor, data) / sizeof(uint64_t)];
      data = uint64_t{role} << 32 | data % 64;  // no kernel looks at more of an address
    }
  }
  Signature(const Signature& other) : used_(other.used_) {
    std::memcpy(words_, other.words_, used_ * sizeof(uint64_t));
  }

  bool operator==(const Signature& other) const {
    return used_ == other.used_ && std::memcmp(words_, other.words_, used_ * sizeof(uint64_t)) == 0;
  }

  /// Of all words. Sums in turn, of shifts, because a compiler makes vectors of that.
  uint64_t hash() const {
    constexpr size_t lanes = 8;
    uint64_t sums[lanes] = {};
    size_t i = 0;
    for (; i + lanes <= used_; i += lanes)
      for (size_t lane = 0; lane < lanes; ++lane) sums[lane] += (sums[lane] << 5) + words_[i + lane];
    for (size_t lane = 0; i < used_; ++i, ++lane) sums[lane] += (sums[lane] << 5) + words_[i];
    uint64_t hash = 0;
    for (const uint64_t sum : sums) hash = (hash ^ sum ^ sum >> 29) * 0x9fb21c651e98df25u;
    return hash ^ hash >> 32;
  }

 private:
  static constexpr size_t capacity = (sizeof(uint64_t) + sizeof(gnaforge_args) + sizeof(gnaforge_problem) +
                                      sizeof(gnaforge_host) + GNAFORGE_ROLES * sizeof(gnaforge_tensor)) /
                                     sizeof(uint64_t);

  /// Returns where the words are.
  template <class T>
  uint64_t* append(const T& part) {
    static_assert(sizeof(T) % sizeof(uint64_t) == 0 && std::is_trivially_copyable_v<T>, "whole words");
    constexpr size_t words = sizeof(T) / sizeof(uint64_t);
    if (words > capacity - used_) throw std::length_error("gnaforge: a call's signature is too long");
    uint64_t* const at = words_ + used_;
    std::memcpy(at, &part, sizeof(T));
    used_ += words;
    return at;
  }

  size_t used_ = 0;
  uint64_t words_[capacity];  // only those in use are ever written or read
};

}  // namespace gnaforge
