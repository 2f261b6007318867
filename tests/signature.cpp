// The memo's key of templates/core/signature.h as C functions, for test_signature.py.
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
