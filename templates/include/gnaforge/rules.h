// The rules of the contract and of GNA itself, which no kernel can lift: codes and words for a call that breaks them.
// The core applies them, and an entry to calls whose caller hasn't (GNAFORGE_ARGS_CHECKED). Host only, no STL.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "gnaforge/abi.h"
#include "gnaforge/names.h"
#include "gnaforge/refusal.h"

#if defined(GNAFORGE_COUNT_CHECKS)
#include <atomic>
// How often the rules were applied, for tests.
extern "C" {
[[gnu::visibility("default")]] inline std::atomic<std::int64_t> gnaforge_rule_checks;
}
#endif

namespace gnaforge {

/// What an op reads and writes, as bits of roles. Extra keys' roles are those of the pieces that the problem has.
struct OpRoles {
  std::uint64_t required, optional, results;
};

constexpr std::uint64_t extra_key_roles(int piece) {
  return bit(GNAFORGE_EXTRA_K + piece) | bit(GNAFORGE_EXTRA_V + piece);
}
constexpr std::uint64_t grad_extra_roles(int piece) {
  return bit(GNAFORGE_GRAD_EXTRA_K + piece) | bit(GNAFORGE_GRAD_EXTRA_V + piece);
}
constexpr std::uint64_t gradient_roles =
    bit(GNAFORGE_GRAD_Q) | bit(GNAFORGE_GRAD_K) | bit(GNAFORGE_GRAD_V) | grad_extra_roles(0) | grad_extra_roles(1);

/// Of a call whose op is known.
inline OpRoles roles_of(const gnaforge_args& args) {
  constexpr std::uint64_t inputs = bit(GNAFORGE_Q) | bit(GNAFORGE_K) | bit(GNAFORGE_V);
  OpRoles roles{inputs, 0, 0};
  if (args.op == GNAFORGE_GNA_FORWARD) {
    roles.results = bit(GNAFORGE_OUT) | bit(GNAFORGE_LSE);
    roles.required |= bit(GNAFORGE_OUT);
    roles.optional = bit(GNAFORGE_LSE);
  } else {
    roles.results =
        args.op == GNAFORGE_GNA_BACKWARD_Q ? bit(GNAFORGE_GRAD_Q) : bit(GNAFORGE_GRAD_K) | bit(GNAFORGE_GRAD_V);
    roles.required |= bit(GNAFORGE_LSE) | bit(GNAFORGE_GRAD_OUT) | roles.results;
    if (args.features & GNAFORGE_FEATURE_DELTA) {
      roles.required |= bit(GNAFORGE_DELTA);
      roles.optional = bit(GNAFORGE_OUT) | bit(GNAFORGE_GRAD_LSE);
    } else {
      roles.required |= bit(GNAFORGE_OUT);
      roles.optional = bit(GNAFORGE_GRAD_LSE) | bit(GNAFORGE_DELTA);
      roles.results |= bit(GNAFORGE_DELTA);
    }
  }
  for (int piece = 0; piece < GNAFORGE_MAX_EXTRA; ++piece) {
    if (args.problem->extra_tokens[piece] == 0) continue;
    roles.required |= extra_key_roles(piece);
    roles.optional |= bit(GNAFORGE_EXTRA_LENGTHS + piece);
    if (args.op != GNAFORGE_GNA_BACKWARD_KV) continue;
    roles.required |= grad_extra_roles(piece);
    roles.results |= grad_extra_roles(piece);
  }
  return roles;
}

/// GNAFORGE_FEATURE_* that the problem's numbers ask for.
inline std::uint64_t features_of(const gnaforge_problem& p) {
  std::uint64_t features = 0;
  for (int d = 0; d < p.rank; ++d) {
    if (p.edge[d] != GNAFORGE_EDGE_SHIFT) features |= GNAFORGE_FEATURE_EDGE;
    if (p.causal[d] == GNAFORGE_CAUSAL_BLOCK) features |= GNAFORGE_FEATURE_BLOCK_CAUSAL;
    if (p.sink[d] != 0) features |= GNAFORGE_FEATURE_SINK;
    if (p.kv_sink[d] != 0) features |= GNAFORGE_FEATURE_KV_SINK;
    if (p.kv_tokens[d] != p.tokens[d] || p.grid[d] != p.tokens[d] || p.q_offset[d] != 0 || p.kv_offset[d] != 0)
      features |= GNAFORGE_FEATURE_RANGE;
  }
  for (const std::int64_t tokens : p.extra_tokens)
    if (tokens != 0) features |= GNAFORGE_FEATURE_EXTRA_KEYS;
  return features;
}

namespace rules {

inline long long number(std::int64_t value) { return value; }
inline int lowest_bit(std::uint64_t bits) { return __builtin_ctzll(bits); }

/// Whatever is read here or later is there. Entries ask this of every call.
inline gnaforge_code structs(const gnaforge_args* args, const Reason& reason) {
  if (args == nullptr || !GNAFORGE_HAS(args, host))
    return reason.refuse(GNAFORGE_BAD_CALL, "gnaforge_args is smaller than version 1.0's");
  if (args->problem == nullptr || !GNAFORGE_HAS(args->problem, extra_tokens))
    return reason.refuse(GNAFORGE_BAD_CALL, "gnaforge_problem is smaller than version 1.0's");
  if (args->host != nullptr && !GNAFORGE_HAS(args->host, parallel_for))
    return reason.refuse(GNAFORGE_BAD_CALL, "gnaforge_host is smaller than version 1.0's");
  if (args->roles > 0 && args->tensors == nullptr)
    return reason.refuse(GNAFORGE_BAD_CALL, "there are %u roles and no tensors", args->roles);
  for (std::uint32_t role = 0; role < args->roles; ++role) {
    const gnaforge_tensor* tensor = args->tensors[role];
    if (tensor == nullptr) continue;
    if (role >= GNAFORGE_ROLES)
      return reason.refuse(GNAFORGE_NO_FEATURE, "there is a tensor of role %u, which this version doesn't know", role);
    if (!GNAFORGE_HAS(tensor, head_stride))
      return reason.refuse(GNAFORGE_BAD_CALL, "gnaforge_tensor of %s is smaller than version 1.0's",
                           role_facts[role].name);
  }
  return GNAFORGE_OK;
}

/// The op's tensors are there, and no others; what is asked for is announced.
inline gnaforge_code roles(const gnaforge_args& args, const Reason& reason) {
  const char* const op = op_name(args.op);
  if (op == nullptr) return reason.refuse(GNAFORGE_NO_OP, "op %u is unknown to this version", args.op);
  if (const std::uint64_t missing = features_of(*args.problem) & ~args.features)
    return reason.refuse(GNAFORGE_BAD_CALL, "the problem needs %s, which features don't announce",
                         feature_name(missing));
  if (args.accumulate != 0 && !(args.features & GNAFORGE_FEATURE_ACCUMULATE))
    return reason.refuse(GNAFORGE_BAD_CALL, "the call needs accumulate, which features don't announce");
  const OpRoles known = roles_of(args);
  std::uint64_t there = 0;
  for (int role = 0; role < roles_end(args); ++role)
    if (args.tensors[role] != nullptr) there |= bit(role);
  if (const std::uint64_t missing = known.required & ~there)
    return reason.refuse(GNAFORGE_BAD_CALL, "%s is missing, which %s needs", role_facts[lowest_bit(missing)].name, op);
  if (const std::uint64_t others = there & ~(known.required | known.optional))
    return reason.refuse(GNAFORGE_BAD_CALL, "%s is there, which %s doesn't take", role_facts[lowest_bit(others)].name,
                         op);
  if (const std::uint64_t others = args.accumulate & ~(known.results & gradient_roles))
    return reason.refuse(GNAFORGE_BAD_CALL, "accumulate holds 0x%llx, which are no gradients that %s writes",
                         static_cast<unsigned long long>(others), op);
  return GNAFORGE_OK;
}

/// Token dimension `d`.
inline gnaforge_code axis(const gnaforge_problem& p, int d, const Reason& reason) {
  const std::int64_t length = p.grid[d], window = p.window[d], stride = p.stride[d], dilation = p.dilation[d];
  if (p.tokens[d] < 0 || p.kv_tokens[d] < 0 || length < 0)
    return reason.refuse(GNAFORGE_BAD_INPUT, "there are %lld tokens along dim %d", number(p.tokens[d]), d);
  if (window < 1)
    return reason.refuse(GNAFORGE_BAD_INPUT, "kernel_size is %lld along dim %d; it must be at least 1", number(window),
                         d);
  if (stride < 1 || stride > window)
    return reason.refuse(GNAFORGE_BAD_INPUT, "stride is %lld along dim %d; it must be 1 to kernel_size (%lld)",
                         number(stride), d, number(window));
  if (dilation < 1)
    return reason.refuse(GNAFORGE_BAD_INPUT, "dilation is %lld along dim %d; it must be at least 1", number(dilation),
                         d);
  if (p.causal[d] < GNAFORGE_CAUSAL_NONE || p.causal[d] > GNAFORGE_CAUSAL_BLOCK)
    return reason.refuse(GNAFORGE_BAD_INPUT, "is_causal is %lld along dim %d; it must be 0, 1 or 2",
                         number(p.causal[d]), d);
  if (p.edge[d] < GNAFORGE_EDGE_SHIFT || p.edge[d] > GNAFORGE_EDGE_WRAP)
    return reason.refuse(GNAFORGE_BAD_INPUT, "edge is %lld along dim %d; it must be 0, 1 or 2", number(p.edge[d]), d);
  const bool wraps = p.edge[d] == GNAFORGE_EDGE_WRAP;
  const bool may_exceed = p.edge[d] == GNAFORGE_EDGE_CUT || p.causal[d] == GNAFORGE_CAUSAL_BLOCK;
  if (length > 0 && !may_exceed && window > length / dilation)
    return reason.refuse(GNAFORGE_BAD_INPUT,
                         "kernel_size %lld times dilation %lld exceeds the %lld tokens along dim %d", number(window),
                         number(dilation), number(length), d);
  if (wraps && length % dilation != 0)
    return reason.refuse(GNAFORGE_BAD_INPUT, "dilation %lld doesn't divide the %lld tokens along dim %d, which wraps",
                         number(dilation), number(length), d);
  if (wraps && p.causal[d] != GNAFORGE_CAUSAL_NONE)
    return reason.refuse(GNAFORGE_BAD_INPUT, "is_causal is %s along dim %d, where edge is wrap; it must be false there",
                         p.causal[d] == GNAFORGE_CAUSAL_BLOCK ? "block" : "true", d);
  if (p.sink[d] < 0)
    return reason.refuse(GNAFORGE_BAD_INPUT, "sink is %lld along dim %d; it must be at least 0", number(p.sink[d]), d);
  if (p.sink[d] > 0 && (wraps || dilation != 1))
    return reason.refuse(GNAFORGE_BAD_INPUT, "sink is %lld along dim %d, which %s; it must be 0 there",
                         number(p.sink[d]), d, wraps ? "wraps" : "has dilation");
  return GNAFORGE_OK;
}

/// What queries of a dilation group see, as positions in the group, sinks apart; `length` is the group's.
struct Seen {
  std::int64_t begin, end;
};

inline Seen seen(const gnaforge_problem& p, int d, std::int64_t length, std::int64_t first, std::int64_t last) {
  const std::int64_t window = p.window[d], stride = p.stride[d];
  const bool causal = p.causal[d] != GNAFORGE_CAUSAL_NONE;
  const std::int64_t lead = causal ? stride - window : stride / 2 - window / 2;
  Seen found{first - first % stride + lead, last - last % stride + lead + window};
  if (p.edge[d] == GNAFORGE_EDGE_WRAP) return found;
  const bool shifts = p.causal[d] == GNAFORGE_CAUSAL_TOKEN || (!causal && p.edge[d] == GNAFORGE_EDGE_SHIFT);
  if (shifts && found.begin > length - window) found.begin = length - window;
  if (found.begin < 0) found.begin = 0;
  if (shifts && found.end < window) found.end = window;
  if (p.causal[d] == GNAFORGE_CAUSAL_TOKEN) found.end = last + 1;
  if (found.end > length) found.end = length;
  return found;
}

/// Queries and keys lie in the grid along dimension `d`, and every key that a query sees is there.
inline gnaforge_code range(const gnaforge_problem& p, int d, const Reason& reason) {
  constexpr std::int64_t limit = std::int64_t{1} << 40;
  for (const std::int64_t value : {p.tokens[d], p.kv_tokens[d], p.grid[d], p.window[d], p.dilation[d], p.sink[d],
                                   p.q_offset[d], p.kv_sink[d], p.kv_offset[d]})
    if (value > limit || value < -limit)
      return reason.refuse(GNAFORGE_BAD_INPUT, "a range is too large along dim %d: %lld", d, number(value));
  const std::int64_t length = p.grid[d], dilation = p.dilation[d], first = p.q_offset[d], head = p.kv_sink[d];
  const std::int64_t begin = p.kv_offset[d], end = begin + p.kv_tokens[d] - head;  // of the keys after those in front
  const bool wraps = p.edge[d] == GNAFORGE_EDGE_WRAP;
  if (head < 0 || head > p.kv_tokens[d])
    return reason.refuse(GNAFORGE_BAD_INPUT, "kv_sink is %lld along dim %d; it must be 0 to the %lld key tokens",
                         number(head), d, number(p.kv_tokens[d]));
  if (head > 0 && (wraps || dilation != 1))
    return reason.refuse(GNAFORGE_BAD_INPUT, "kv_sink is %lld along dim %d, which %s; it must be 0 there", number(head),
                         d, wraps ? "wraps" : "has dilation");
  if (begin < (wraps ? -limit : head))
    return reason.refuse(GNAFORGE_BAD_INPUT, "kv_offset is %lld along dim %d; it must be at least %lld%s",
                         number(begin), d, number(head), head > 0 ? ", which is kv_sink" : " where edge is not wrap");
  if (!wraps && end > length)
    return reason.refuse(GNAFORGE_BAD_INPUT, "key tokens reach up to %lld along dim %d, beyond the grid's %lld",
                         number(end), d, number(length));
  if (first < 0)
    return reason.refuse(GNAFORGE_BAD_INPUT, "q_offset is %lld along dim %d; it must be at least 0", number(first), d);
  if (p.window[d] == length && dilation == 1 && p.causal[d] == GNAFORGE_CAUSAL_NONE && p.edge[d] != GNAFORGE_EDGE_CUT) {
    // Dense: every query sees every key, wherever it is.
    if (p.kv_tokens[d] == length) return GNAFORGE_OK;
    return reason.refuse(GNAFORGE_BAD_INPUT,
                         "all of the grid's %lld tokens along dim %d are seen, and there are %lld keys", number(length),
                         d, number(p.kv_tokens[d]));
  }
  const std::int64_t last = first + p.tokens[d] - 1;
  if (last >= length)
    return reason.refuse(GNAFORGE_BAD_INPUT, "query tokens reach up to %lld along dim %d, beyond the grid's %lld",
                         number(last + 1), d, number(length));
  if (p.tokens[d] == 0 || (wraps && begin == 0 && end == length)) return GNAFORGE_OK;
  // Neighbouring windows touch, so those of a group's queries are one interval. Groups between two bounds differ in
  // nothing but their offset.
  Seen all{length + limit, -2 * limit};
  for (const std::int64_t bound :
       {std::int64_t{0}, first % dilation, (last + 1) % dilation, length % dilation, dilation})
    for (const std::int64_t group : {bound - 1, bound}) {
      if (group < 0 || group >= dilation || (last < group) || (last - group) / dilation * dilation + group < first)
        continue;
      const std::int64_t from = first <= group ? 0 : (first - group + dilation - 1) / dilation;
      const Seen own = seen(p, d, (length - group + dilation - 1) / dilation, from, (last - group) / dilation);
      if (group + own.begin * dilation < all.begin) all.begin = group + own.begin * dilation;
      if (group + (own.end - 1) * dilation >= all.end) all.end = group + (own.end - 1) * dilation + 1;
    }
  std::int64_t sink_end = p.sink[d] < length ? p.sink[d] : length;
  if (p.causal[d] != GNAFORGE_CAUSAL_NONE && sink_end > all.end) sink_end = all.end;
  const auto stored = [head, begin, end](Seen keys) {
    return keys.begin >= keys.end || keys.end <= head || (keys.begin >= begin && keys.end <= end) ||
           (begin == head && keys.begin >= 0 && keys.end <= end);
  };
  for (const Seen& keys : {Seen{0, sink_end}, all})
    if (!stored(keys))
      return reason.refuse(GNAFORGE_BAD_INPUT,
                           "queries see the keys %lld to %lld along dim %d, which are not all there: kv_offset is "
                           "%lld, and there are %lld key tokens, %lld of them the grid's first (kv_sink)",
                           number(keys.begin), number(keys.end - 1), d, number(begin), number(p.kv_tokens[d]),
                           number(head));
  return GNAFORGE_OK;
}

inline gnaforge_code problem(const gnaforge_problem& p, const Reason& reason) {
  if (p.rank < 1 || p.rank > GNAFORGE_MAX_RANK)
    return reason.refuse(GNAFORGE_BAD_INPUT, "rank is %d; it must be 1 to %d", static_cast<int>(p.rank),
                         GNAFORGE_MAX_RANK);
  if (p.batch < 0 || p.heads < 0 || p.kv_heads < 0)
    return reason.refuse(GNAFORGE_BAD_INPUT, "batch is %lld, heads is %lld, kv_heads is %lld; none may be negative",
                         number(p.batch), number(p.heads), number(p.kv_heads));
  if (p.kv_heads == 0 ? p.heads != 0 : p.heads % p.kv_heads != 0)
    return reason.refuse(GNAFORGE_BAD_INPUT,
                         "%lld query heads can't be shared among %lld key/value heads; it must divide evenly",
                         number(p.heads), number(p.kv_heads));
  if (p.head_dim < 0 || p.value_head_dim < 0)
    return reason.refuse(GNAFORGE_BAD_INPUT, "head_dim is %lld, value_head_dim is %lld; neither may be negative",
                         number(p.head_dim), number(p.value_head_dim));
  for (int piece = 0; piece < GNAFORGE_MAX_EXTRA; ++piece)
    if (p.extra_tokens[piece] < 0)
      return reason.refuse(GNAFORGE_BAD_INPUT, "piece %d of the extra keys has %lld tokens", piece,
                           number(p.extra_tokens[piece]));
  for (int d = 0; d < p.rank; ++d) {
    if (const gnaforge_code code = axis(p, d, reason)) return code;
    if (features_of(p) & (GNAFORGE_FEATURE_RANGE | GNAFORGE_FEATURE_KV_SINK))
      if (const gnaforge_code code = range(p, d, reason)) return code;
  }
  return GNAFORGE_OK;
}

/// Adds the distance to the last of `size` elements that are `stride` apart; false on overflow.
inline bool add_reach(std::int64_t size, std::int64_t stride, std::int64_t& reach) {
  std::int64_t distance;
  if (stride == INT64_MIN) return size <= 1;
  return !__builtin_mul_overflow(size > 0 ? size - 1 : 0, stride < 0 ? -stride : stride, &distance) &&
         !__builtin_add_overflow(reach, distance, &reach);
}

/// Every offset into the tensor in bytes, and the number of its elements, fit an int64.
inline bool spans_int64(const Sizes& sizes, const gnaforge_tensor& tensor, int bytes) {
  std::int64_t elements = sizes.batch, reach = sizes.channels, ignored;
  bool fits = !__builtin_mul_overflow(elements, sizes.heads, &elements) &&
              !__builtin_mul_overflow(elements, sizes.channels, &elements) &&
              add_reach(sizes.batch, tensor.batch_stride, reach) && add_reach(sizes.heads, tensor.head_stride, reach);
  for (int d = 0; d < GNAFORGE_MAX_RANK; ++d)
    fits = fits && !__builtin_mul_overflow(elements, sizes.tokens[d], &elements) &&
           add_reach(sizes.tokens[d], tensor.token_stride[d], reach);
  return fits && !__builtin_mul_overflow(elements, std::int64_t{bytes}, &ignored) &&
         !__builtin_mul_overflow(reach, std::int64_t{bytes}, &ignored);
}

/// True if two elements have one address because a stride is 0.
inline bool repeats(const Sizes& sizes, const gnaforge_tensor& tensor) {
  if ((sizes.batch > 1 && tensor.batch_stride == 0) || (sizes.heads > 1 && tensor.head_stride == 0)) return true;
  for (int d = 0; d < GNAFORGE_MAX_RANK; ++d)
    if (sizes.tokens[d] > 1 && tensor.token_stride[d] == 0) return true;
  return false;
}

inline gnaforge_code tensors(const gnaforge_args& args, const Reason& reason) {
  const std::uint64_t results = roles_of(args).results;
  for (int role = 0; role < roles_end(args); ++role) {
    const gnaforge_tensor* tensor = args.tensors[role];
    if (tensor == nullptr) continue;
    const RoleFacts& facts = role_facts[role];
    const int bytes = dtype_bytes(tensor->dtype);
    if (bytes == 0) return reason.refuse(GNAFORGE_NO_DTYPE, "%s is of unknown dtype %u", facts.name, tensor->dtype);
    if (facts.dtype != 0 && tensor->dtype != facts.dtype)
      return reason.refuse(GNAFORGE_BAD_INPUT, "%s is %s, it must be %s", facts.name, dtype_name(tensor->dtype),
                           dtype_name(facts.dtype));
    if (reinterpret_cast<std::uintptr_t>(tensor->data) % static_cast<unsigned>(bytes) != 0)
      return reason.refuse(GNAFORGE_BAD_INPUT, "%s is not aligned to its elements of %d bytes", facts.name, bytes);
    const Sizes sizes = sizes_of(*args.problem, role);
    if (!spans_int64(sizes, *tensor, bytes))
      return reason.refuse(GNAFORGE_BAD_INPUT, "%s is too large: its sizes and strides reach beyond 64 bits",
                           facts.name);
    if ((results & bit(role)) && repeats(sizes, *tensor))
      return reason.refuse(GNAFORGE_BAD_INPUT, "%s has a stride of 0, so its elements overlap", facts.name);
  }
  return GNAFORGE_OK;
}

/// All of the above but `structs`, which comes first.
inline gnaforge_code call(const gnaforge_args& args, const Reason& reason) {
#if defined(GNAFORGE_COUNT_CHECKS)
  ++gnaforge_rule_checks;
#endif
  if (const gnaforge_code code = problem(*args.problem, reason)) return code;
  if (const gnaforge_code code = roles(args, reason)) return code;
  return tensors(args, reason);
}

}  // namespace rules

}  // namespace gnaforge
