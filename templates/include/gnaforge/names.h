// The contract's names, for messages, and what a role's tensor is. Host only, no STL.
#pragma once

#include <cstdint>

#include "gnaforge/abi.h"

namespace gnaforge {

inline const char* dtype_name(std::uint32_t dtype) {
  switch (dtype) {
    case GNAFORGE_FP32: return "fp32";
    case GNAFORGE_BF16: return "bf16";
    case GNAFORGE_FP16: return "fp16";
    case GNAFORGE_INT32: return "int32";
    case GNAFORGE_E4M3: return "e4m3";
    default: return "of unknown dtype";
  }
}

/// Bytes of an element; 0 of an unknown dtype.
constexpr int dtype_bytes(std::uint32_t dtype) {
  switch (dtype) {
    case GNAFORGE_FP32: return 4;
    case GNAFORGE_BF16: return 2;
    case GNAFORGE_FP16: return 2;
    case GNAFORGE_INT32: return 4;
    case GNAFORGE_E4M3: return 1;
    default: return 0;
  }
}

inline const char* device_name(std::uint32_t device) {
  switch (device) {
    case GNAFORGE_CPU: return "cpu";
    case GNAFORGE_CUDA: return "cuda";
    default: return "an unknown device";
  }
}

/// What a key begins with; null of an unknown op.
inline const char* op_name(std::uint32_t op) {
  switch (op) {
    case GNAFORGE_GNA_FORWARD: return "gna_forward";
    case GNAFORGE_GNA_BACKWARD_Q: return "gna_backward_q";
    case GNAFORGE_GNA_BACKWARD_KV: return "gna_backward_kv";
    default: return nullptr;
  }
}

/// Of the features, by bit.
constexpr const char* feature_names[] = {"edge",       "block_causal",  "sink",         "range",      "kv_sink",
                                         "extra_keys", "head_patterns", "varlen",       "accumulate", "delta",
                                         "descale",    "block_lists",   "deterministic"};
constexpr int feature_count = sizeof(feature_names) / sizeof(feature_names[0]);

/// The name of the lowest bit that is set; "an unknown feature" for one of a later version.
inline const char* feature_name(std::uint64_t features) {
  for (int bit = 0; bit < feature_count; ++bit)
    if (features >> bit & 1) return feature_names[bit];
  return "an unknown feature";
}

enum class Tokens { none, query, key, extra };
enum class Heads { none, query, key };
enum class Channels { none, head_dim, value_head_dim };

/// The tensor of a role.
struct RoleFacts {
  const char* name;
  Tokens tokens;
  Heads heads;
  Channels channels;
  std::uint32_t dtype;  ///< 0: the kernel says.
  int piece;            ///< Of the extra keys.
};

constexpr RoleFacts role_facts[] = {
    {"query", Tokens::query, Heads::query, Channels::head_dim, 0, 0},
    {"key", Tokens::key, Heads::key, Channels::head_dim, 0, 0},
    {"value", Tokens::key, Heads::key, Channels::value_head_dim, 0, 0},
    {"out", Tokens::query, Heads::query, Channels::value_head_dim, 0, 0},
    {"log_sum_exp", Tokens::query, Heads::query, Channels::none, GNAFORGE_FP32, 0},
    {"grad_out", Tokens::query, Heads::query, Channels::value_head_dim, 0, 0},
    {"grad_log_sum_exp", Tokens::query, Heads::query, Channels::none, GNAFORGE_FP32, 0},
    {"grad_query", Tokens::query, Heads::query, Channels::head_dim, 0, 0},
    {"grad_key", Tokens::key, Heads::key, Channels::head_dim, 0, 0},
    {"grad_value", Tokens::key, Heads::key, Channels::value_head_dim, 0, 0},
    {"delta", Tokens::query, Heads::query, Channels::none, GNAFORGE_FP32, 0},
    {"extra_key", Tokens::extra, Heads::key, Channels::head_dim, 0, 0},
    {"second extra_key", Tokens::extra, Heads::key, Channels::head_dim, 0, 1},
    {"extra_value", Tokens::extra, Heads::key, Channels::value_head_dim, 0, 0},
    {"second extra_value", Tokens::extra, Heads::key, Channels::value_head_dim, 0, 1},
    {"extra_lengths", Tokens::none, Heads::none, Channels::none, GNAFORGE_INT32, 0},
    {"second extra_lengths", Tokens::none, Heads::none, Channels::none, GNAFORGE_INT32, 1},
    {"grad_extra_key", Tokens::extra, Heads::key, Channels::head_dim, 0, 0},
    {"second grad_extra_key", Tokens::extra, Heads::key, Channels::head_dim, 0, 1},
    {"grad_extra_value", Tokens::extra, Heads::key, Channels::value_head_dim, 0, 0},
    {"second grad_extra_value", Tokens::extra, Heads::key, Channels::value_head_dim, 0, 1},
    {"descale_query", Tokens::none, Heads::query, Channels::none, GNAFORGE_FP32, 0},
    {"descale_key", Tokens::none, Heads::key, Channels::none, GNAFORGE_FP32, 0},
    {"descale_value", Tokens::none, Heads::key, Channels::none, GNAFORGE_FP32, 0},
    {"block_index", Tokens::none, Heads::none, Channels::none, GNAFORGE_INT32, 0},
    {"block_counts", Tokens::none, Heads::none, Channels::none, GNAFORGE_INT32, 0},
};
static_assert(sizeof(role_facts) / sizeof(role_facts[0]) == GNAFORGE_ROLES, "a row per role");

/// A role as a bit, as in gnaforge_args.accumulate.
constexpr std::uint64_t bit(int role) { return std::uint64_t{1} << role; }

/// The tensor of a role; null if the call has none.
inline const gnaforge_tensor* tensor_of(const gnaforge_args& args, int role) {
  return static_cast<std::uint32_t>(role) < args.roles ? args.tensors[role] : nullptr;
}

/// Roles of this version that a call may have tensors of: 0 up to this.
inline int roles_end(const gnaforge_args& args) {
  return args.roles < GNAFORGE_ROLES ? static_cast<int>(args.roles) : GNAFORGE_ROLES;
}

/// How many token dims a role's tensor has.
inline int token_dims(const gnaforge_problem& problem, int role) {
  switch (role_facts[role].tokens) {
    case Tokens::none: return 0;
    case Tokens::extra: return 1;
    default: return problem.rank;
  }
}

/// Sizes of a role's tensor, in the order of its strides; 1 of dims that it doesn't have.
struct Sizes {
  std::int64_t batch, tokens[GNAFORGE_MAX_RANK], heads, channels;
};

inline Sizes sizes_of(const gnaforge_problem& problem, int role) {
  const RoleFacts& facts = role_facts[role];
  Sizes sizes{problem.batch, {1, 1, 1}, 1, 1};
  if (facts.tokens == Tokens::extra) sizes.tokens[0] = problem.extra_tokens[facts.piece];
  for (int d = 0; d < problem.rank; ++d) {
    if (facts.tokens == Tokens::query) sizes.tokens[d] = problem.tokens[d];
    if (facts.tokens == Tokens::key) sizes.tokens[d] = problem.kv_tokens[d];
  }
  if (facts.heads != Heads::none) sizes.heads = facts.heads == Heads::query ? problem.heads : problem.kv_heads;
  if (facts.channels != Channels::none)
    sizes.channels = facts.channels == Channels::head_dim ? problem.head_dim : problem.value_head_dim;
  return sizes;
}

}  // namespace gnaforge
