// A refusal: a code of the contract, and words for people. Host only, no STL.
#pragma once

#include <cstdarg>
#include <cstddef>
#include <cstdio>

#include "gnaforge/abi.h"

namespace gnaforge {

/// Where a refusal writes its words.
struct Reason {
  char* text;
  std::size_t size;

  /// Formats the words; returns the code, so that a check can `return reason.refuse(...)`.
  [[gnu::format(printf, 3, 4)]] gnaforge_code refuse(gnaforge_code code, const char* format, ...) const {
    if (text == nullptr || size == 0) return code;
    std::va_list values;
    va_start(values, format);
    std::vsnprintf(text, size, format, values);
    va_end(values);
    return code;
  }
};

}  // namespace gnaforge
