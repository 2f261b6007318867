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
    if (args.features & GNAFORGE_FEATURE_DESCALE)
      roles.optional |= bit(GNAFORGE_DESCALE_Q) | bit(GNAFORGE_DESCALE_K) | bit(GNAFORGE_DESCALE_V);
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
/// The plural's ending after a number of things.
inline const char* s(std::int64_t count) { return count == 1 ? "" : "s"; }
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
  if (p.tokens[d] < 0)
    return reason.refuse(GNAFORGE_BAD_INPUT, "query tokens are %lld along dim %d; they must be at least 0",
                         number(p.tokens[d]), d);
  if (p.kv_tokens[d] < 0)
    return reason.refuse(GNAFORGE_BAD_INPUT, "key tokens are %lld along dim %d; they must be at least 0",
                         number(p.kv_tokens[d]), d);
  if (length < 0)
    return reason.refuse(GNAFORGE_BAD_INPUT, "grid is %lld along dim %d; it must be at least 0", number(length), d);
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
                         "kernel_size %lld times dilation %lld exceeds the %lld token%s along dim %d; %s must be at "
                         "most %lld there",
                         number(window), number(dilation), number(length), s(length), d,
                         dilation > length ? "dilation" : "kernel_size",
                         number(dilation > length ? length : length / dilation));
  if (wraps && length % dilation != 0)
    return reason.refuse(GNAFORGE_BAD_INPUT,
                         "dilation is %lld along dim %d, which wraps; it must divide the %lld "
                         "token%s there",
                         number(dilation), d, number(length), s(length));
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

/// The first position, within a dilation group, that is not before `token` of the grid.
inline std::int64_t position(std::int64_t token, std::int64_t group, std::int64_t dilation) {
  const std::int64_t distance = token - group;
  return distance / dilation + (distance % dilation > 0);
}

/// Keys along a dimension that queries see and that are not there, and these queries, by their places in the grid.
struct Missing {
  static constexpr std::int64_t far = std::int64_t{1} << 62;
  Seen keys[4] = {{far, -far}, {far, -far}, {far, -far}, {far, -far}};  ///< Of sinks and of windows: before, after.
  Seen queries[4] = {{far, -far}, {far, -far}, {far, -far}, {far, -far}};
  Seen all{far, -far};  ///< All that queries see, sinks apart.

  static void add(Seen& to, std::int64_t begin, std::int64_t last) {
    if (begin < to.begin) to.begin = begin;
    if (last >= to.end) to.end = last + 1;
  }

  /// Adds a dilation group, whose queries are at the positions `first` to `last` of it.
  void look(const gnaforge_problem& p, int d, std::int64_t group, std::int64_t first, std::int64_t last) {
    const std::int64_t dilation = p.dilation[d], length = position(p.grid[d], group, dilation), head = p.kv_sink[d];
    const std::int64_t begin = position(p.kv_offset[d], group, dilation);
    const std::int64_t end = position(p.kv_offset[d] + p.kv_tokens[d] - head, group, dilation);
    const Seen own = seen(p, d, length, first, last);
    add(all, group + own.begin * dilation, group + (own.end - 1) * dilation);
    const bool causal = p.causal[d] != GNAFORGE_CAUSAL_NONE;
    const std::int64_t sink = p.sink[d] < length ? p.sink[d] : length;
    // Keys are not there between those in front and the others, and after these.
    const Seen gaps[] = {{head > 0 ? head : -far, begin}, {end, far}};
    const Seen parts[] = {{0, causal && sink > own.end ? own.end : sink}, own};
    for (int i = 0; i < 4; ++i) {
      const Seen gap = gaps[i / 2], part = parts[i % 2];
      const Seen lost{part.begin > gap.begin ? part.begin : gap.begin, part.end < gap.end ? part.end : gap.end};
      if (lost.begin >= lost.end) continue;
      // Windows end after the first of them; those of a sink's queries need not where not causal, nor begin anywhere.
      std::int64_t from = first, to = last;
      if (i % 2 == 1 || causal)
        from = partition(first, last + 1, [&](std::int64_t q) { return seen(p, d, length, q, q).end > lost.begin; });
      if (i % 2 == 1)
        to = partition(from, last + 1, [&](std::int64_t q) { return seen(p, d, length, q, q).begin >= lost.end; }) - 1;
      add(keys[i], group + lost.begin * dilation, group + (lost.end - 1) * dilation);
      add(queries[i], group + from * dilation, group + to * dilation);
    }
  }

  /// The first of [low, high) for which something holds that then holds for all; `high` if there is none.
  template <class Holds>
  static std::int64_t partition(std::int64_t low, std::int64_t high, const Holds& holds) {
    while (low < high) {
      const std::int64_t middle = low + (high - low) / 2;
      if (holds(middle))
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  }

  gnaforge_code refuse(const gnaforge_problem& p, int d, const Reason& reason) const {
    int i = 0;
    while (i < 4 && keys[i].begin >= keys[i].end) ++i;
    if (i == 4) return GNAFORGE_OK;
    if (reason.text == nullptr) return GNAFORGE_BAD_INPUT;
    char who[64], lost[64], front[64] = "", sink[64] = "";
    if (queries[i].begin + 1 == queries[i].end)
      std::snprintf(who, sizeof(who), "query %lld sees", number(queries[i].begin));
    else
      std::snprintf(who, sizeof(who), "queries %lld to %lld see", number(queries[i].begin), number(queries[i].end - 1));
    if (keys[i].begin + 1 == keys[i].end)
      std::snprintf(lost, sizeof(lost), "key %lld of the grid", number(keys[i].begin));
    else
      std::snprintf(lost, sizeof(lost), "keys %lld to %lld of the grid", number(keys[i].begin),
                    number(keys[i].end - 1));
    const std::int64_t head = p.kv_sink[d], there = p.kv_tokens[d] - head;
    if (head > 0) std::snprintf(front, sizeof(front), "the first %lld (kv_sink) and ", number(head));
    if (p.sink[d] > 0) std::snprintf(sink, sizeof(sink), " and the first %lld (sink)", number(p.sink[d]));
    return reason.refuse(GNAFORGE_BAD_INPUT,
                         "%s %s along dim %d, which the key tensor lacks: it has %s%lld key%s from kv_offset (%lld) "
                         "on, and queries see %lld to %lld%s in all",
                         who, lost, d, front, number(there), s(there), number(p.kv_offset[d]), number(all.begin),
                         number(all.end - 1), sink);
  }
};

/// Queries and keys lie in the grid along dimension `d`, and every key that a query sees is there.
inline gnaforge_code range(const gnaforge_problem& p, int d, const Reason& reason) {
  constexpr std::int64_t limit = std::int64_t{1} << 40;
  const struct {
    const char* name;
    std::int64_t value;
  } fields[] = {{"query tokens", p.tokens[d]}, {"key tokens", p.kv_tokens[d]}, {"grid", p.grid[d]},
                {"kernel_size", p.window[d]},  {"dilation", p.dilation[d]},    {"sink", p.sink[d]},
                {"q_offset", p.q_offset[d]},   {"kv_sink", p.kv_sink[d]},      {"kv_offset", p.kv_offset[d]}};
  for (const auto& field : fields)
    if (field.value > limit || field.value < -limit)
      return reason.refuse(GNAFORGE_BAD_INPUT, "%s: %lld along dim %d is too large for a range; at most 2^40",
                           field.name, number(field.value), d);
  const std::int64_t length = p.grid[d], dilation = p.dilation[d], first = p.q_offset[d], head = p.kv_sink[d];
  const std::int64_t begin = p.kv_offset[d], end = begin + p.kv_tokens[d] - head;  // of the keys after those in front
  const bool wraps = p.edge[d] == GNAFORGE_EDGE_WRAP;
  if (head < 0 || head > p.kv_tokens[d])
    return reason.refuse(GNAFORGE_BAD_INPUT, "kv_sink is %lld along dim %d; it must be 0 to the %lld key token%s",
                         number(head), d, number(p.kv_tokens[d]), s(p.kv_tokens[d]));
  if (head > 0 && (wraps || dilation != 1))
    return reason.refuse(GNAFORGE_BAD_INPUT, "kv_sink is %lld along dim %d, which %s; it must be 0 there", number(head),
                         d, wraps ? "wraps" : "has dilation");
  if (begin < (wraps ? -limit : head))
    return reason.refuse(GNAFORGE_BAD_INPUT, "kv_offset is %lld along dim %d; it must be at least %lld%s",
                         number(begin), d, number(head), head > 0 ? ", which is kv_sink" : " where edge is not wrap");
  if (!wraps && end > length)
    return reason.refuse(GNAFORGE_BAD_INPUT,
                         "kv_offset is %lld along dim %d, and the %lld key%s from there on end at %lld; they must end "
                         "by %lld, as the grid does",
                         number(begin), d, number(end - begin), s(end - begin), number(end), number(length));
  if (first < 0)
    return reason.refuse(GNAFORGE_BAD_INPUT, "q_offset is %lld along dim %d; it must be at least 0", number(first), d);
  if (p.window[d] == length && dilation == 1 && p.causal[d] == GNAFORGE_CAUSAL_NONE && p.edge[d] != GNAFORGE_EDGE_CUT) {
    // Dense: every query sees every key, wherever it is.
    if (p.kv_tokens[d] == length) return GNAFORGE_OK;
    return reason.refuse(GNAFORGE_BAD_INPUT,
                         "key tokens are %lld along dim %d, where every query sees all of the grid; they must be its "
                         "%lld",
                         number(p.kv_tokens[d]), d, number(length));
  }
  const std::int64_t last = first + p.tokens[d] - 1;
  if (last >= length)
    return reason.refuse(GNAFORGE_BAD_INPUT,
                         "q_offset is %lld along dim %d, and the %lld quer%s from there on end at %lld; they must end "
                         "by %lld, as the grid does",
                         number(first), d, number(p.tokens[d]), p.tokens[d] == 1 ? "y" : "ies", number(last + 1),
                         number(length));
  if (p.tokens[d] == 0 || (wraps && begin == 0 && end == length)) return GNAFORGE_OK;
  // Neighbouring windows touch, so those of a group's queries are one interval. Groups between two bounds differ in
  // nothing but their offset.
  const std::int64_t ends[] = {0, first, last + 1, length, begin, end};
  Missing missing;
  std::int64_t looked[12];
  int count = 0;
  for (int i = 0; i < 12; ++i) {
    const std::int64_t group = (ends[i / 2] % dilation + dilation - i % 2) % dilation;
    bool skip = last < group || group + (last - group) / dilation * dilation < first;  // no queries
    for (int other = 0; other < count; ++other) skip = skip || looked[other] == group;
    if (skip) continue;
    looked[count++] = group;
    missing.look(p, d, group, position(first, group, dilation), (last - group) / dilation);
  }
  return missing.refuse(p, d, reason);
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
                         "%lld query head%s can't be shared among %lld key/value head%s; it must divide evenly",
                         number(p.heads), s(p.heads), number(p.kv_heads), s(p.kv_heads));
  if (p.head_dim < 0 || p.value_head_dim < 0)
    return reason.refuse(GNAFORGE_BAD_INPUT, "head_dim is %lld, value_head_dim is %lld; neither may be negative",
                         number(p.head_dim), number(p.value_head_dim));
  for (int piece = 0; piece < GNAFORGE_MAX_EXTRA; ++piece)
    if (p.extra_tokens[piece] < 0)
      return reason.refuse(GNAFORGE_BAD_INPUT, "extra_tokens is %lld in piece %d; it must be at least 0",
                           number(p.extra_tokens[piece]), piece);
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
