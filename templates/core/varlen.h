// Calls over packed samples, [batch, tokens, heads, channels]: neighborhood attention of samples with layouts of their
// own, and dense attention of samples with lengths of their own.
#pragma once

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "forward.h"
#include "slices.h"

namespace gnaforge {

#define GNAFORGE_FORWARD_VARLEN_ARGUMENTS                                                           \
  "Tensor q, Tensor k, Tensor v, int rank, SymInt[] layouts, SymInt[] pattern, float? scale=None, " \
  "str key=\"\", Tensor? extra_k=None, Tensor? extra_v=None, Tensor? extra_lengths=None"
#define GNAFORGE_ATTENTION_VARLEN_ARGUMENTS                                                         \
  "Tensor q, Tensor k, Tensor v, Tensor cumulative_q, Tensor cumulative_kv, bool is_causal=False, " \
  "float? scale=None, str key=\"\""
constexpr const char* forward_varlen_signature = "(" GNAFORGE_FORWARD_VARLEN_ARGUMENTS ") -> (Tensor, Tensor)";
constexpr const char* forward_varlen_out_signature =
    "(" GNAFORGE_FORWARD_VARLEN_ARGUMENTS ", *, Tensor(a!) output, Tensor(b!) output_lse) -> ()";
constexpr const char* attention_varlen_signature = "(" GNAFORGE_ATTENTION_VARLEN_ARGUMENTS ") -> (Tensor, Tensor)";
constexpr const char* attention_varlen_out_signature =
    "(" GNAFORGE_ATTENTION_VARLEN_ARGUMENTS ", *, Tensor(a!) output, Tensor(b!) output_lse) -> ()";
#undef GNAFORGE_FORWARD_VARLEN_ARGUMENTS
#undef GNAFORGE_ATTENTION_VARLEN_ARGUMENTS

/// Computes the slices of `whole` that are made, of numbers that `kind` gives a meaning, into results of the caller's
/// or new ones, which it returns.
template <class MakeSlices>
std::tuple<Tensor, Tensor> run_packed(const ForwardTensors& tensors, const GivenForward& given,
                                      const gnaforge_problem& whole, std::string_view key, char kind,
                                      const std::vector<int64_t>& numbers, const ForwardResults* own,
                                      const MakeSlices& make_slices) {
  ForwardCall forward(tensors, given, whole);
  if (own != nullptr) forward.take_results(given.q, *own);
  std::tuple<Tensor, Tensor> results = own != nullptr ? std::tuple(own->out, own->lse) : forward.make_results(given.q);
  if (has_no_rows(whole)) {
    forward.call.check_slices(make_slices(), "", false);
  } else {
    forward.call.prepare_slices(key, kind, numbers, make_slices);
    forward.call.launch();
  }
  return results;
}

/// What slices of samples are made of.
inline std::vector<int64_t> numbers_of_samples(const Layouts& layouts, const std::vector<int64_t>& pattern) {
  std::vector<int64_t> numbers{layouts.rank, static_cast<int64_t>(layouts.extents.size())};
  numbers.insert(numbers.end(), layouts.extents.begin(), layouts.extents.end());
  numbers.insert(numbers.end(), pattern.begin(), pattern.end());
  return numbers;
}

/// And those of samples with lengths.
inline std::vector<int64_t> numbers_of_lengths(bool is_causal, const Lengths& q, const Lengths& kv) {
  std::vector<int64_t> numbers{is_causal};
  numbers.insert(numbers.end(), q.ends.begin(), q.ends.end());
  numbers.insert(numbers.end(), kv.ends.begin(), kv.ends.end());
  return numbers;
}

inline std::tuple<Tensor, Tensor> run_samples(const ForwardTensors& tensors, const Layouts& layouts,
                                              const std::vector<int64_t>& pattern, std::optional<double> scale,
                                              std::string_view key, const ForwardResults* own) {
  const GivenForward given = tensors.given();
  const gnaforge_problem whole = gather_packed(given, scale, false, layouts.count());
  return run_packed(tensors, given, whole, key, 'v', numbers_of_samples(layouts, pattern), own,
                    [&] { return slices_of_samples(whole, layouts, pattern); });
}

inline std::tuple<Tensor, Tensor> forward_varlen(const Tensor& query, const Tensor& key, const Tensor& value,
                                                 int64_t rank, const std::vector<int64_t>& layouts,
                                                 const std::vector<int64_t>& pattern, std::optional<double> scale,
                                                 StringHandle pinned_key, const std::optional<Tensor>& extra_k,
                                                 const std::optional<Tensor>& extra_v,
                                                 const std::optional<Tensor>& extra_lengths) {
  const Text pinned(pinned_key);
  const Piece piece{pointer_to(extra_k), pointer_to(extra_v), pointer_to(extra_lengths)};
  return run_samples({query, key, value, {piece, {}}}, {rank, layouts}, pattern, scale, pinned.view(), nullptr);
}

inline void forward_varlen_out(const Tensor& query, const Tensor& key, const Tensor& value, int64_t rank,
                               const std::vector<int64_t>& layouts, const std::vector<int64_t>& pattern,
                               std::optional<double> scale, StringHandle pinned_key,
                               const std::optional<Tensor>& extra_k, const std::optional<Tensor>& extra_v,
                               const std::optional<Tensor>& extra_lengths, const Tensor& out, const Tensor& lse) {
  const Text pinned(pinned_key);
  const Piece piece{pointer_to(extra_k), pointer_to(extra_v), pointer_to(extra_lengths)};
  const ForwardResults own{out, lse};
  run_samples({query, key, value, {piece, {}}}, {rank, layouts}, pattern, scale, pinned.view(), &own);
}

/// `count` entries of a tensor along a dim, from `first` on.
inline Tensor part_of(const Tensor& tensor, size_t dim, int64_t first, int64_t count) {
  std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
  sizes[dim] = count;
  const int64_t stride = tensor.stride(static_cast<int64_t>(dim));
  return view_of(tensor, sizes, {tensor.strides().begin(), tensor.strides().end()}, first * stride);
}

/// `count` tokens of a packed tensor, from `first` on.
inline Tensor tokens_of(const Tensor& tensor, int64_t first, int64_t count) { return part_of(tensor, 1, first, count); }

/// A number on the host, to be copied.
inline Tensor minus_infinity() {
  const int64_t one = 1;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &one, &one, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &handle));
  Tensor number(handle);
  *static_cast<float*>(number.mutable_data_ptr()) = -std::numeric_limits<float>::infinity();
  return number;
}

inline std::tuple<Tensor, Tensor> run_lengths(const Tensor& query, const Tensor& key, const Tensor& value,
                                              const Tensor& cumulative_q, const Tensor& cumulative_kv, bool is_causal,
                                              std::optional<double> scale, StringHandle pinned_key,
                                              const ForwardResults* own) {
  const Text pinned(pinned_key);
  const ForwardTensors tensors{query, key, value, {}};
  const GivenForward given = tensors.given();
  const gnaforge_problem whole = gather_packed(given, scale, true);
  const Lengths q{"cumulative_seqlen_Q", numbers_of(cumulative_q, "cumulative_seqlen_Q")},
      kv{"cumulative_seqlen_KV", numbers_of(cumulative_kv, "cumulative_seqlen_KV")};
  auto results = run_packed(tensors, given, whole, pinned.view(), 'l', numbers_of_lengths(is_causal, q, kv), own,
                            [&] { return slices_of_lengths(whole, q, kv, is_causal); });
  for (size_t i = 1; i < q.ends.size(); ++i) {
    const int64_t first = q.ends[i - 1], queries = q.ends[i] - first;
    if (queries == 0 || kv.ends[i] != kv.ends[i - 1]) continue;  // what follows is for samples without keys
    TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(tokens_of(std::get<0>(results), first, queries).get()));
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_copy_(tokens_of(std::get<1>(results), first, queries).get(), minus_infinity().get(), 0));
  }
  return results;
}

inline std::tuple<Tensor, Tensor> attention_varlen(const Tensor& query, const Tensor& key, const Tensor& value,
                                                   const Tensor& cumulative_q, const Tensor& cumulative_kv,
                                                   bool is_causal, std::optional<double> scale,
                                                   StringHandle pinned_key) {
  return run_lengths(query, key, value, cumulative_q, cumulative_kv, is_causal, scale, pinned_key, nullptr);
}

inline void attention_varlen_out(const Tensor& query, const Tensor& key, const Tensor& value,
                                 const Tensor& cumulative_q, const Tensor& cumulative_kv, bool is_causal,
                                 std::optional<double> scale, StringHandle pinned_key, const Tensor& out,
                                 const Tensor& lse) {
  const ForwardResults own{out, lse};
  run_lengths(query, key, value, cumulative_q, cumulative_kv, is_causal, scale, pinned_key, &own);
}

}  // namespace gnaforge
