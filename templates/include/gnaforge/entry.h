// What every kernel's entry does with gnaforge_args, whatever the arch: checks the call, and turns it into typed form.
// Host only.
//
// A kernel is described by a Config, which its template renders:
//   struct Config {
//     static constexpr const char* key;
//     static constexpr gnaforge_dtype dtype;
//     static constexpr int head_dim, value_head_dim;  // 0: any
//     using QTile = Box<...>;
//     using KvTile = Box<...>;
//   };
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>

#include "gnaforge/abi.h"
#include "gnaforge/gna/axis.h"

namespace gnaforge {

/// Bits of gnaforge_args.features that this version knows.
constexpr std::uint64_t known_features = 0;

constexpr int max_head_dim = 256;
constexpr int head_dim_multiple = 8;

/// Where a refusal writes its reason.
struct Reason {
  char* text;
  std::size_t size;

  /// Formats the reason; false, so that a check can `return reason.refuse(...)`.
  [[gnu::format(printf, 2, 3)]] bool refuse(const char* format, ...) const {
    if (text == nullptr || size == 0) return false;
    std::va_list values;
    va_start(values, format);
    std::vsnprintf(text, size, format, values);
    va_end(values);
    return false;
  }
};

inline const char* dtype_name(std::uint32_t dtype) {
  switch (dtype) {
    case GNAFORGE_FP32: return "fp32";
    case GNAFORGE_BF16: return "bf16";
    case GNAFORGE_FP16: return "fp16";
    default: return "of unknown dtype";
  }
}

namespace check {

inline bool structs(const gnaforge_args* args, const Reason& reason) {
  if (args == nullptr || !GNAFORGE_HAS(args, host)) return reason.refuse("gnaforge_args is smaller than version 1.0's");
  if (args->features & ~known_features)
    return reason.refuse("features 0x%llx are unknown to this kernel",
                         static_cast<unsigned long long>(args->features & ~known_features));
  if (args->problem == nullptr || !GNAFORGE_HAS(args->problem, scale))
    return reason.refuse("gnaforge_problem is smaller than version 1.0's");
  const gnaforge_tensor* const tensors[] = {args->q, args->k, args->v, args->out};
  for (const gnaforge_tensor* tensor : tensors)
    if (tensor == nullptr || !GNAFORGE_HAS(tensor, head_stride))
      return reason.refuse("gnaforge_tensor is smaller than version 1.0's");
  if (args->log_sum_exp != nullptr && !GNAFORGE_HAS(args->log_sum_exp, head_stride))
    return reason.refuse("gnaforge_tensor is smaller than version 1.0's");
  return true;
}

inline bool dtypes(const gnaforge_args& args, std::uint32_t dtype, const Reason& reason) {
  const gnaforge_tensor* const tensors[] = {args.q, args.k, args.v, args.out};
  const char* const names[] = {"query", "key", "value", "out"};
  for (int i = 0; i < 4; ++i)
    if (tensors[i]->dtype != dtype)
      return reason.refuse("%s is %s, this kernel takes %s", names[i], dtype_name(tensors[i]->dtype),
                           dtype_name(dtype));
  if (args.log_sum_exp != nullptr && args.log_sum_exp->dtype != GNAFORGE_FP32)
    return reason.refuse("log_sum_exp is %s, this kernel writes fp32", dtype_name(args.log_sum_exp->dtype));
  return true;
}

/// `fixed` is the head dim that the kernel was built for; 0 if it takes any.
inline bool head_dim(const char* name, std::int64_t value, int fixed, const Reason& reason) {
  if (fixed != 0 && value != fixed)
    return reason.refuse("%s is %lld, this kernel takes %d", name, static_cast<long long>(value), fixed);
  if (value < head_dim_multiple || value > max_head_dim || value % head_dim_multiple != 0)
    return reason.refuse("%s is %lld, this kernel takes multiples of %d up to %d", name,
                         static_cast<long long>(value), head_dim_multiple, max_head_dim);
  return true;
}

inline bool heads(const gnaforge_problem& problem, const Reason& reason) {
  const auto heads = static_cast<long long>(problem.heads);
  const auto kv_heads = static_cast<long long>(problem.kv_heads);
  if (problem.batch < 0) return reason.refuse("batch is %lld", static_cast<long long>(problem.batch));
  if (heads < 0 || kv_heads < 0) return reason.refuse("heads is %lld, kv_heads is %lld", heads, kv_heads);
  if (heads > 0 && (kv_heads == 0 || heads % kv_heads != 0))
    return reason.refuse("heads is %lld, not a multiple of kv_heads, %lld", heads, kv_heads);
  return true;
}

/// Checks token dimension `d` of the problem and writes it to `axis`.
inline bool axis(const gnaforge_problem& problem, int d, Axis& axis, const Reason& reason) {
  const auto tokens = static_cast<long long>(problem.tokens[d]);
  const auto window = static_cast<long long>(problem.window[d]);
  const auto stride = static_cast<long long>(problem.stride[d]);
  const auto dilation = static_cast<long long>(problem.dilation[d]);
  if (tokens < 1 || tokens > max_axis_length)
    return reason.refuse("tokens[%d] is %lld, must be 1 to %d", d, tokens, max_axis_length);
  if (dilation < 1 || dilation > tokens)
    return reason.refuse("dilation[%d] is %lld, must be 1 to tokens[%d], %lld", d, dilation, d, tokens);
  if (window < 1 || window > tokens / dilation)
    return reason.refuse("window[%d] is %lld, must be 1 to tokens[%d] / dilation[%d], %lld", d, window, d, d,
                         tokens / dilation);
  if (stride < 1 || stride > window)
    return reason.refuse("stride[%d] is %lld, must be 1 to window[%d], %lld", d, stride, d, window);
  if (problem.causal[d] != 0 && problem.causal[d] != 1)
    return reason.refuse("causal[%d] is %lld, must be 0 or 1", d, static_cast<long long>(problem.causal[d]));
  axis = Axis{static_cast<int>(tokens), static_cast<int>(window), static_cast<int>(stride),
              static_cast<int>(dilation), problem.causal[d] == 1};
  return true;
}

}  // namespace check

/// True if a kernel of `Config` that runs on `device` computes the call, and then `axes` is its layout; else the
/// reason is written. Data pointers are not looked at.
template <class Config>
bool check_call(const gnaforge_args* args, gnaforge_device device, Axis (&axes)[Config::QTile::rank],
                const Reason& reason) {
  constexpr int rank = Config::QTile::rank;
  if (!check::structs(args, reason)) return false;
  const gnaforge_problem& problem = *args->problem;
  if (args->device != static_cast<std::uint32_t>(device))
    return reason.refuse("the tensors are on %s, this kernel runs on %s", args->device == GNAFORGE_CPU ? "cpu" : "cuda",
                         device == GNAFORGE_CPU ? "cpu" : "cuda");
  if (problem.rank != rank)
    return reason.refuse("rank is %d, this kernel takes %d", static_cast<int>(problem.rank), rank);
  constexpr int fixed_value_dim = Config::value_head_dim != 0 ? Config::value_head_dim : Config::head_dim;
  if (!check::dtypes(*args, Config::dtype, reason) ||
      !check::head_dim("head_dim", problem.head_dim, Config::head_dim, reason) ||
      !check::head_dim("value_head_dim", problem.value_head_dim, fixed_value_dim, reason) ||
      !check::heads(problem, reason))
    return false;
  for (int d = 0; d < rank; ++d)
    if (!check::axis(problem, d, axes[d], reason)) return false;
  return true;
}

/// gnaforge_entry.visited_work of a call whose kernel computes `scores` elements of Q K^T per batch entry and head.
inline double visited_work(const gnaforge_problem& problem, double scores) {
  return scores * static_cast<double>(problem.batch) * static_cast<double>(problem.heads) *
         static_cast<double>(problem.head_dim + problem.value_head_dim);
}

}  // namespace gnaforge
