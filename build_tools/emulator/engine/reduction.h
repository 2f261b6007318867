// Read-modify-write operations on one element, for atom, red and bulk reductions.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "types.h"

namespace gnaforge::emulator {

enum class Reduction : uint8_t { add, min, max, inc, dec, bit_and, bit_or, bit_xor, exchange, compare_swap, none };

/// The operation that the opcode's parts name.
Reduction reduction_named(const std::vector<std::string>& parts);
/// The new value of an element: `old` combined with `a` (and `b`, which compare-and-swap stores).
uint64_t reduced(Reduction operation, Type type, uint64_t old, uint64_t a, uint64_t b = 0);

}  // namespace gnaforge::emulator
