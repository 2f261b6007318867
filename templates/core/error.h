// Why a call failed: words for people, and a number for the Python runtime, which must not read the words. No torch.
#pragma once

#include <cstddef>
#include <new>
#include <stdexcept>
#include <string>

#include "gnaforge/abi.h"

namespace gnaforge {

/// Of errors that the operators raise; codegen/runtime/core.py has the same. Below 64: as gnaforge_code.
enum class ErrorCode : int {
  other = 0,
  bad_input = GNAFORGE_BAD_INPUT,  ///< The call itself is wrong, whatever kernels there are.
  layout = GNAFORGE_NO_LAYOUT,     ///< No kernel takes the tensors as they lie; one would take contiguous copies.
  failed = GNAFORGE_FAILED,        ///< The kernel was chosen, and its run failed.
  out_of_memory = GNAFORGE_OUT_OF_MEMORY,
  none_fits = 64,  ///< No kernel that is loaded computes the call.
  missing = 65,    ///< The kernel that is asked for by its key is not loaded.
  refused = 66,    ///< It is loaded, and doesn't compute the call.
};

/// The last error that this thread raised. Torch makes a Python exception of its text alone.
struct LastError {
  ErrorCode code = ErrorCode::other;
  std::string text;
  size_t begin = 0, end = 0;  ///< Of the text without whose error it is, and without how to register a kernel.
};

inline LastError& last_error() {
  thread_local LastError error;
  return error;
}

/// Keeps the error for `gnaforge_core_error`; returns its whole text.
inline const std::string& keep_error(ErrorCode code, const std::string& text, const std::string& advice = "") {
  const std::string who = "gnaforge: ";
  last_error() = {code, who + text + advice, who.size(), who.size() + text.size()};
  return last_error().text;
}

[[noreturn]] inline void raise(ErrorCode code, const std::string& text, const std::string& advice = "") {
  throw std::runtime_error(keep_error(code, text, advice));
}

/// Becomes a MemoryError in Python.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(const std::string& text) : text_(text) {}
  const char* what() const noexcept override { return text_.what(); }

 private:
  std::runtime_error text_;  // which can be copied without memory
};

/// `text` says how much was wanted for what. Torch has an error of its own for GPUs, which only Python can make.
[[noreturn]] inline void raise_out_of_memory(bool cuda, const std::string& text) {
  if (cuda) raise(ErrorCode::out_of_memory, "CUDA out of memory: " + text);
  throw OutOfMemory(keep_error(ErrorCode::out_of_memory, "out of memory: " + text));
}

}  // namespace gnaforge
