// The operator for inputs of 8 bits, whose numbers are multiplied by a descale of their head. Results are the caller's:
// their dtype is no input's. It is apart from the others so that these are not slower for it.
#pragma once

#include <optional>
#include <string_view>
#include <vector>

#include "forward.h"

namespace gnaforge {

constexpr const char* forward_scaled_out_signature =
    "(Tensor q, Tensor k, Tensor v, int[] pattern, float? scale=None, str key=\"\", Tensor? extra_k=None, "
    "Tensor? extra_v=None, Tensor? extra_lengths=None, Tensor? descale_q=None, Tensor? descale_k=None, "
    "Tensor? descale_v=None, *, Tensor(a!) output, Tensor(b!) output_lse) -> ()";

/// Refuses descales that are not float32 [batch, heads] of their tensor, on the query's device.
inline void check_descale(const Given& descale, const Given& q, int64_t batch, int64_t heads) {
  check_shape(descale, {batch, heads}, "query and key");
  if (descale.dtype != ScalarType::Float)
    refuse(descale.name, " is ", type_name(descale.dtype), "; it must be float32");
  check_device(descale, q);
}

/// Says that the call has these descales, null where it hasn't.
inline void read_descales(Call& call, const Given& q, const gnaforge_problem& problem,
                          const Tensor* const (&descales)[3]) {
  static constexpr const char* names[] = {"descale_q", "descale_k", "descale_v"};
  for (int i = 0; i < 3; ++i) {
    if (descales[i] == nullptr) continue;
    check_descale(given(*descales[i], names[i]), q, problem.batch, i == 0 ? problem.heads : problem.kv_heads);
    call.read(static_cast<gnaforge_role>(GNAFORGE_DESCALE_Q + i), *descales[i]);
    call.need(GNAFORGE_FEATURE_DESCALE);
  }
}

inline void forward_scaled_out(const Tensor& query, const Tensor& key, const Tensor& value,
                               const std::vector<int64_t>& pattern, std::optional<double> scale,
                               StringHandle pinned_key, const std::optional<Tensor>& extra_k,
                               const std::optional<Tensor>& extra_v, const std::optional<Tensor>& extra_lengths,
                               const std::optional<Tensor>& descale_q, const std::optional<Tensor>& descale_k,
                               const std::optional<Tensor>& descale_v, const Tensor& out, const Tensor& lse) {
  const Text pinned(pinned_key);
  const ForwardTensors tensors{
      query, key, value, {{pointer_to(extra_k), pointer_to(extra_v), pointer_to(extra_lengths)}, {}}};
  GivenForward given = tensors.given();
  given.scaled = true;
  const gnaforge_problem problem = gather_first(given, pattern, scale);
  ForwardCall forward(tensors, given, problem);
  forward.set_patterns(given, pattern, scale);
  read_descales(forward.call, given.q, problem, {pointer_to(descale_q), pointer_to(descale_k), pointer_to(descale_v)});
  forward.take_results(given.q, {out, lse});
  forward.run(pinned.view());
}

}  // namespace gnaforge
