// Parts of templates/core as C functions, for test_signature.py and test_core_calls.py.
#include <cstdio>

#include "error.h"
#include "signature.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

/// Whether the memo takes one call for the other.
EXPORT int same(const gnaforge_args* a, const gnaforge_args* b) {
  return gnaforge::Signature(1, *a) == gnaforge::Signature(1, *b);
}

EXPORT uint64_t slot(const gnaforge_args* args, uint64_t generation) {
  return gnaforge::Signature(generation, *args).hash();
}

/// Whether a signature of that many tensors is refused.
EXPORT int too_long(const gnaforge_args* args) {
  try {
    gnaforge::Signature(1, *args);
    return 0;
  } catch (const std::length_error&) {
    return 1;
  }
}

/// 1 for a std::bad_alloc, 2 for a std::runtime_error.
EXPORT int thrown_without_memory(bool cuda, char* text, size_t n) {
  try {
    gnaforge::raise_out_of_memory(cuda, "5 bytes");
  } catch (const std::bad_alloc& error) {
    std::snprintf(text, n, "%s", error.what());
    return 1;
  } catch (const std::runtime_error& error) {
    std::snprintf(text, n, "%s", error.what());
    return 2;
  }
}
