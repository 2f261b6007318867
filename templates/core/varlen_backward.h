// The backward pass of calls over packed samples: their slices run as one list, as the forward pass' do.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "backward.h"
#include "varlen.h"

namespace gnaforge {

constexpr const char* backward_varlen_signature =
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int rank, "
    "SymInt[] layouts, SymInt[] pattern, float? scale, int wanted, str key_q=\"\", str key_kv=\"\", "
    "Tensor? extra_k=None, Tensor? extra_v=None, Tensor? extra_lengths=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)";
constexpr const char* attention_backward_varlen_signature =
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cumulative_q, "
    "Tensor cumulative_kv, bool is_causal, float? scale, int wanted, str key_q=\"\", str key_kv=\"\") "
    "-> (Tensor, Tensor, Tensor)";

inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward_varlen(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, int64_t rank, const std::vector<int64_t>& extents,
    const std::vector<int64_t>& pattern, std::optional<double> scale, int64_t wanted, StringHandle key_q,
    StringHandle key_kv, const std::optional<Tensor>& extra_k, const std::optional<Tensor>& extra_v,
    const std::optional<Tensor>& extra_lengths) {
  const Text pinned_q(key_q), pinned_kv(key_kv);
  const Layouts layouts(rank, extents);
  const ForwardTensors tensors{q, k, v, {{pointer_to(extra_k), pointer_to(extra_v), pointer_to(extra_lengths)}, {}}};
  const gnaforge_problem whole = gather_packed(tensors.given(), scale, false, layouts.count());
  BackwardCall call({tensors, out, lse, grad_out, pointer_to(grad_lse)}, whole, wants_both(wanted));
  call.set_slices('v', numbers_of_samples(layouts, pattern),
                  [&] { return slices_of_samples(whole, layouts, pattern); });
  auto found = run_backward(call, tensors, wanted, pinned_q.view(), pinned_kv.view());
  // Extra keys of samples without tokens are of no slice.
  for (int64_t i = 0; whole.extra_tokens[0] > 0 && i < layouts.count(); ++i) {
    if (std::find(layouts.of(i), layouts.of(i) + rank, 0) == layouts.of(i) + rank) continue;
    for (const size_t kind : {3, 4})
      for (int64_t row = i; (wanted >> kind & 1) && row < whole.batch * layouts.count(); row += layouts.count())
        set_to_zero(part_of(found[kind], 0, row, 1));
  }
  return std::tuple_cat(found);
}

inline std::tuple<Tensor, Tensor, Tensor> attention_backward_varlen(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const Tensor& cumulative_q, const Tensor& cumulative_kv, bool is_causal,
    std::optional<double> scale, int64_t wanted, StringHandle key_q, StringHandle key_kv) {
  const Text pinned_q(key_q), pinned_kv(key_kv);
  const ForwardTensors tensors{q, k, v, {}};
  const gnaforge_problem whole = gather_packed(tensors.given(), scale, true);
  const Lengths of_q{"cumulative_seqlen_Q", numbers_of(cumulative_q, "cumulative_seqlen_Q")},
      of_kv{"cumulative_seqlen_KV", numbers_of(cumulative_kv, "cumulative_seqlen_KV")};
  BackwardCall call({tensors, out, lse, grad_out, pointer_to(grad_lse)}, whole, wants_both(wanted));
  call.set_slices('l', numbers_of_lengths(is_causal, of_q, of_kv),
                  [&] { return slices_of_lengths(whole, of_q, of_kv, is_causal); });
  auto found = run_backward(call, tensors, wanted, pinned_q.view(), pinned_kv.view());
  // Queries without keys, and keys that no query sees, are of no slice.
  for (size_t i = 1; i < of_q.ends.size(); ++i) {
    const int64_t queries = of_q.ends[i] - of_q.ends[i - 1], keys = of_kv.ends[i] - of_kv.ends[i - 1];
    if (keys == 0 && queries > 0 && (wanted & 1)) set_to_zero(tokens_of(found[0], of_q.ends[i - 1], queries));
    const int64_t seen = queries == 0 ? 0 : is_causal ? std::min(queries, keys) : keys;
    for (const size_t kind : {1, 2})
      if (seen < keys && (wanted >> kind & 1))
        set_to_zero(tokens_of(found[kind], of_kv.ends[i - 1] + seen, keys - seen));
  }
  return {found[0], found[1], found[2]};
}

}  // namespace gnaforge
