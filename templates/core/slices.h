// What operators make lists of: heads with patterns of their own, samples with layouts of their own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "calls.h"
#include "given.h"

namespace gnaforge {

/// A pattern of its own for each of `heads`, if `count` numbers are as many; else 1. One head's is all heads'.
inline int64_t head_patterns(const Given& query, size_t count) {
  const int64_t rank = query.dims - 3;
  if (rank < 1 || rank > GNAFORGE_MAX_RANK) return 1;
  const int64_t heads = query.sizes[rank + 1], numbers = static_cast<int64_t>(count);
  for (const size_t groups : {plain_groups, all_groups})
    if (heads > 1 && numbers == heads * rank * static_cast<int64_t>(groups)) return heads;
  return 1;
}

/// The problem of a call, with the first head's pattern where heads have their own.
inline gnaforge_problem gather_first(const GivenForward& tensors, const std::vector<int64_t>& pattern,
                                     std::optional<double> scale) {
  const auto patterns = static_cast<size_t>(head_patterns(tensors.q, pattern.size()));
  return gather(tensors, pattern.data(), pattern.size() / patterns, scale);
}

/// Slices of heads, of a call whose problem has the first head's pattern. Neighbours with one pattern are one slice, if
/// they are whole groups that share a head of keys, or of one such group.
inline Slices slices_of_heads(const GivenForward& tensors, const gnaforge_problem& whole, const int64_t* pattern,
                              size_t count, std::optional<double> scale) {
  const int64_t group = whole.kv_heads > 0 ? whole.heads / whole.kv_heads : 0;
  if (group == 0 || whole.heads % whole.kv_heads != 0) {
    char text[512] = "";
    rules::problem(whole, {text, sizeof(text)});
    refuse(text);
  }
  const size_t own = count / static_cast<size_t>(whole.heads);
  const auto of = [pattern, own](int64_t head) { return pattern + static_cast<size_t>(head) * own; };
  Slices slices;
  const auto add = [&](const gnaforge_problem& p, int64_t begin, int64_t end) {
    const bool shares = begin % group != 0;  // its keys with the slice before
    slices.all.push_back({p, false, 0, 0, begin, begin / group, shares ? slices.all.back().round + 1 : 0});
    slices.all.back().problem.heads = end - begin;
    slices.all.back().problem.kv_heads = end - begin > group ? (end - begin) / group : 1;
    slices.names.push_back("head " + std::to_string(begin));
  };
  for (int64_t begin = 0, end = 0; begin < whole.heads; begin = end) {
    while (end < whole.heads && std::equal(of(begin), of(begin) + own, of(end))) ++end;
    gnaforge_problem p{};
    try {
      p = gather(tensors, of(begin), own, scale);
    } catch (const std::runtime_error&) {
      const LastError error = last_error();
      raise(error.code,
            "head " + std::to_string(begin) + ": " + error.text.substr(error.begin, error.end - error.begin));
    }
    // The part of a group, whole groups, the part of a group.
    int64_t at = begin;
    if (const int64_t border = (begin + group - 1) / group * group; at < border) {
      add(p, at, std::min(border, end));
      at = std::min(border, end);
    }
    if (const int64_t border = end / group * group; at < border) {
      add(p, at, border);
      at = border;
    }
    if (at < end) add(p, at, end);
  }
  return slices;
}

/// Adds a slice of one sample. Where the whole has one batch entry, neighbours with one problem are a batch.
inline void add_sample(Slices& slices, const Slice& slice, int64_t sample) {
  const gnaforge_problem& p = slice.problem;
  if (p.batch == 1 && !slices.all.empty()) {
    Slice& last = slices.all.back();
    int64_t queries = last.problem.batch, keys = last.problem.batch;
    for (int d = 0; d < p.rank; ++d) {
      queries *= last.problem.tokens[d];
      keys *= last.problem.kv_tokens[d];
    }
    gnaforge_problem one = last.problem;
    one.batch = 1;
    const bool has_pieces = p.extra_tokens[0] > 0 || p.extra_tokens[1] > 0;
    if (slice.token == last.token + queries && slice.kv_token == last.kv_token + keys && slice.round == last.round &&
        (!has_pieces || slice.sample == last.sample + last.problem.batch) && std::memcmp(&one, &p, sizeof(p)) == 0) {
      ++last.problem.batch;
      return;
    }
  }
  slices.all.push_back(slice);
  slices.names.push_back("sample " + std::to_string(sample));
}

/// Layouts of samples: numbers as torch gives them.
struct Layouts {
  int64_t rank;
  const std::vector<int64_t>& extents;  ///< `rank` of each sample.

  Layouts(int64_t given_rank, const std::vector<int64_t>& given) : rank(given_rank), extents(given) {
    if (rank < 1 || rank > GNAFORGE_MAX_RANK || extents.size() % static_cast<size_t>(rank) != 0)
      refuse("layouts hold ", extents.size(), " numbers, which are not ", rank, " of each sample");
  }

  int64_t count() const { return static_cast<int64_t>(extents.size()) / rank; }
  const int64_t* of(int64_t sample) const { return extents.data() + sample * rank; }
};

/// Slices of samples that lie one after the other along the only token dim of a call's tensors. A pattern is
/// everybody's, or there is one for each sample. Raises an error unless the samples have all tokens.
inline Slices slices_of_samples(const gnaforge_problem& whole, const Layouts& layouts,
                                const std::vector<int64_t>& pattern) {
  const int64_t rank = layouts.rank, samples = layouts.count();
  const auto numbers = static_cast<int64_t>(pattern.size());
  int64_t own = 0;  // numbers of a pattern
  bool common = true;
  for (const size_t groups : {plain_groups, all_groups}) {
    const int64_t one = rank * static_cast<int64_t>(groups);
    if (numbers != one && numbers != samples * one) continue;
    own = one;
    common = numbers == one;
    break;
  }
  if (own == 0)
    refuse("pattern must hold window, stride, dilation and causal of ", rank,
           " dimensions, perhaps also edge, sink, grid, q_offset, kv_offset and kv_sink, once or for each of ", samples,
           " samples; got ", numbers, " numbers");
  Slices slices;
  int64_t token = 0;
  for (int64_t i = 0; i < samples; ++i) {
    Slice slice{whole, true, token, token, 0, 0, 0, i, samples};
    gnaforge_problem& p = slice.problem;
    p.rank = static_cast<int32_t>(rank);
    int64_t tokens = 1;
    bool fits = true;
    for (int d = 0; d < p.rank; ++d) {
      const int64_t extent = layouts.of(i)[d];
      if (extent < 0) refuse("layout of sample ", i, " is ", sizes_text(layouts.of(i), static_cast<size_t>(rank)));
      p.tokens[d] = p.kv_tokens[d] = extent;
      fits = fits && !__builtin_mul_overflow(tokens, extent, &tokens);
    }
    if (!fits || __builtin_add_overflow(token, tokens, &token)) refuse("layouts have more than 2^63 tokens");
    if (tokens == 0) continue;
    take_pattern(p, pattern.data() + (common ? 0 : i * own), own == rank * static_cast<int64_t>(plain_groups));
    add_sample(slices, slice, i);
  }
  if (token != whole.tokens[0])
    refuse("layouts have ", token, " tokens, and query, key and value have ", whole.tokens[0]);
  return slices;
}

/// Where the samples of packed queries, or of packed keys, end.
struct Lengths {
  const char* name;
  std::vector<int64_t> ends;  ///< The first is 0.

  /// Raises an error unless the lengths are at least 0, and reach the `tokens` that there are.
  void check(int64_t tokens) const {
    if (ends.empty() || ends.front() != 0) refuse(name, " must begin with 0");
    for (size_t i = 1; i < ends.size(); ++i)
      if (ends[i] < ends[i - 1]) refuse(name, " goes from ", ends[i - 1], " down to ", ends[i], " at entry ", i);
    if (ends.back() != tokens) refuse(name, " ends with ", ends.back(), ", and there are ", tokens, " tokens");
  }
};

/// Slices of dense attention of packed samples. A causal query sees the keys of its sample up to its own place in it,
/// as in torch's scaled_dot_product_attention: so those beyond the last key see all, and are a slice of their own.
/// Queries of samples without keys are of no slice.
inline Slices slices_of_lengths(const gnaforge_problem& whole, const Lengths& q, const Lengths& kv, bool is_causal) {
  q.check(whole.tokens[0]);
  kv.check(whole.kv_tokens[0]);
  if (q.ends.size() != kv.ends.size())
    refuse(q.name, " is of ", q.ends.size() - 1, " samples, ", kv.name, " of ", kv.ends.size() - 1);
  Slices slices;
  for (size_t i = 1; i < q.ends.size(); ++i) {
    const int64_t queries = q.ends[i] - q.ends[i - 1], keys = kv.ends[i] - kv.ends[i - 1];
    if (queries == 0 || keys == 0) continue;
    const auto add = [&](int64_t first, int64_t count, int64_t seen, int64_t causal) {
      Slice slice{whole, true, q.ends[i - 1] + first, kv.ends[i - 1], 0, 0, first > 0};
      slice.problem.tokens[0] = count;
      slice.problem.kv_tokens[0] = seen;
      const int64_t pattern[] = {seen, 1, 1, causal};
      take_pattern(slice.problem, pattern, true);
      add_sample(slices, slice, static_cast<int64_t>(i) - 1);
    };
    const int64_t square = is_causal ? std::min(queries, keys) : 0;
    if (square > 0) add(0, square, square, GNAFORGE_CAUSAL_TOKEN);
    if (queries > square) add(square, queries - square, keys, GNAFORGE_CAUSAL_NONE);
  }
  return slices;
}

}  // namespace gnaforge
