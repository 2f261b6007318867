// What every kernel's entry does with gnaforge_args, whatever the family: refuses calls that it doesn't compute, and
// turns the others into typed form. Host only.
//
// A kernel is described by a Config, which its template renders with templates/_config.j2:
//   struct Config {
//     static constexpr const char* key;
//     static constexpr gnaforge_op op;
//     static constexpr std::uint64_t features;             // GNAFORGE_FEATURE_*
//     static constexpr gnaforge_dtype dtype, out_dtype;    // of the inputs and of the output
//     static constexpr int head_dim, value_head_dim;       // 0: any
//     using QTile = Box<...>;
//     using KvTile = Box<...>;
//   };
#pragma once

#include <cstdint>

#include "gnaforge/abi.h"
#include "gnaforge/gna/axis.h"
#include "gnaforge/names.h"
#include "gnaforge/refusal.h"
#include "gnaforge/rules.h"

namespace gnaforge {

constexpr int max_head_dim = 256;
constexpr int head_dim_multiple = 8;

/// An entry's part in choosing: what it computes, where its tensors are, which GNAFORGE_FEATURE_* it has.
struct Traits {
  gnaforge_op op;
  gnaforge_device device;
  std::uint64_t features;
};

namespace check {

/// Tensors whose dtype is the kernel's to say have `dtype`; the output and its gradient have `out_dtype`.
inline gnaforge_code dtypes(const gnaforge_args& args, std::uint32_t dtype, std::uint32_t out_dtype,
                            const Reason& reason) {
  for (int role = 0; role < roles_end(args); ++role) {
    const gnaforge_tensor* tensor = tensor_of(args, role);
    const std::uint32_t own = role == GNAFORGE_OUT || role == GNAFORGE_GRAD_OUT ? out_dtype : dtype;
    if (tensor != nullptr && role_facts[role].dtype == 0 && tensor->dtype != own)
      return reason.refuse(GNAFORGE_NO_DTYPE, "%s is %s, this kernel takes %s", role_facts[role].name,
                           dtype_name(tensor->dtype), dtype_name(own));
  }
  return GNAFORGE_OK;
}

/// `fixed` is the head dim that the kernel was built for; 0 if it takes any.
inline gnaforge_code head_dim(const char* name, std::int64_t value, int fixed, const Reason& reason) {
  if (fixed != 0 && value != fixed)
    return reason.refuse(GNAFORGE_NO_HEAD_DIM, "%s is %lld, this kernel takes %d", name, static_cast<long long>(value),
                         fixed);
  if (value < head_dim_multiple || value > max_head_dim || value % head_dim_multiple != 0)
    return reason.refuse(GNAFORGE_NO_HEAD_DIM, "%s is %lld, this kernel takes multiples of %d up to %d", name,
                         static_cast<long long>(value), head_dim_multiple, max_head_dim);
  return GNAFORGE_OK;
}

/// Positions along token dimension `d` fit the kernel's ints.
inline gnaforge_code axis_length(const gnaforge_problem& problem, int d, const Reason& reason) {
  const struct {
    const char* name;
    std::int64_t value, least;
  } fields[] = {{"tokens", problem.tokens[d], 1},     {"key tokens", problem.kv_tokens[d], 1},
                {"grid", problem.grid[d], 1},         {"kernel_size", problem.window[d], 1},
                {"dilation", problem.dilation[d], 1}, {"kv_offset", problem.kv_offset[d], -max_axis_length}};
  for (const auto& field : fields)
    if (field.value < field.least || field.value > max_axis_length)
      return reason.refuse(GNAFORGE_NO_SIZE, "%s[%d] is %lld, must be %lld to %d", field.name, d,
                           static_cast<long long>(field.value), static_cast<long long>(field.least), max_axis_length);
  return GNAFORGE_OK;
}

/// `run` gets what the others may do without: the data of all tensors.
inline gnaforge_code data(const gnaforge_args& args, const Reason& reason) {
  for (int role = 0; role < roles_end(args); ++role) {
    const gnaforge_tensor* tensor = tensor_of(args, role);
    if (tensor != nullptr && tensor->data == nullptr)
      return reason.refuse(GNAFORGE_BAD_CALL, "the data of %s are null", role_facts[role].name);
  }
  return GNAFORGE_OK;
}

/// And its workspace, where it needs one.
inline gnaforge_code workspace(const void* memory, const Reason& reason) {
  if (memory == nullptr || reinterpret_cast<std::uintptr_t>(memory) % 256 != 0)
    return reason.refuse(GNAFORGE_BAD_CALL, "the workspace is null or not aligned to 256 bytes");
  return GNAFORGE_OK;
}

}  // namespace check

/// The layout of a problem that `check_call` accepts.
template <int Rank>
void copy_axes(const gnaforge_problem& problem, Axis (&axes)[Rank]) {
  for (int d = 0; d < Rank; ++d)
    axes[d] = Axis{static_cast<int>(problem.tokens[d]), static_cast<int>(problem.window[d]),
                   make_divisor(static_cast<int>(problem.stride[d])), static_cast<int>(problem.dilation[d]),
                   problem.causal[d] != 0};
}

/// GNAFORGE_OK if a kernel of `Config` and `traits` computes the call, else why not; the rest of can_run is the
/// family's. Data pointers are looked at for their alignment to elements.
template <class Config>
gnaforge_code check_call(const gnaforge_args* args, const Traits& traits, const Reason& reason) {
  constexpr int rank = Config::QTile::rank;
  if (const gnaforge_code code = rules::structs(args, reason)) return code;
  if (args->op != traits.op) {
    const char* const op = op_name(args->op);
    return reason.refuse(GNAFORGE_NO_OP, "the call is %s, this kernel computes %s", op ? op : "an unknown op",
                         op_name(traits.op));
  }
  if (const std::uint64_t missing = args->features & ~traits.features)
    return reason.refuse(GNAFORGE_NO_FEATURE, "the call needs %s, which this kernel doesn't have",
                         feature_name(missing));
  if (!(args->flags & GNAFORGE_ARGS_CHECKED))
    if (const gnaforge_code code = rules::call(*args, reason)) return code;
  const gnaforge_problem& problem = *args->problem;
  if (args->device != static_cast<std::uint32_t>(traits.device))
    return reason.refuse(GNAFORGE_NO_DEVICE, "the tensors are on %s, this kernel runs on %s", device_name(args->device),
                         device_name(traits.device));
  if (problem.rank != rank)
    return reason.refuse(GNAFORGE_NO_RANK, "rank is %d, this kernel takes %d", static_cast<int>(problem.rank), rank);
  constexpr int fixed_value_dim = Config::value_head_dim != 0 ? Config::value_head_dim : Config::head_dim;
  if (const gnaforge_code code = check::dtypes(*args, Config::dtype, Config::out_dtype, reason)) return code;
  if (const gnaforge_code code = check::head_dim("head_dim", problem.head_dim, Config::head_dim, reason)) return code;
  if (const gnaforge_code code = check::head_dim("value_head_dim", problem.value_head_dim, fixed_value_dim, reason))
    return code;
  for (int d = 0; d < rank; ++d)
    if (const gnaforge_code code = check::axis_length(problem, d, reason)) return code;
  return GNAFORGE_OK;
}

/// gnaforge_entry.visited_work of a call whose kernel computes `scores` elements of Q K^T per batch entry and head.
inline double visited_work(const gnaforge_problem& problem, double scores) {
  return scores * static_cast<double>(problem.batch) * static_cast<double>(problem.heads) *
         static_cast<double>(problem.head_dim + problem.value_head_dim);
}

}  // namespace gnaforge
