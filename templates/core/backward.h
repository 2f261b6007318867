// The backward pass of a call: gradients of Q, and of K and V, each by a kernel of its own.
#pragma once

#include <array>
#include <functional>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "forward.h"

namespace gnaforge {

constexpr const char* backward_signature =
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int[] pattern, "
    "float? scale, int wanted, str key_q=\"\", str key_kv=\"\", Tensor? extra_k=None, Tensor? extra_v=None, "
    "Tensor? extra_lengths=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)";

/// What some queries' backward pass is given: the tensors of their forward call, its results, and their gradients.
struct BackwardTensors {
  ForwardTensors forward;
  const Tensor &out, &lse, &grad_out;
  const Tensor* grad_lse;  ///< Null: zero.
};

/// A result, and the tensor that it is written to.
struct Gradient {
  gnaforge_role role;
  Tensor tensor;
};

/// A gradient of a tensor, not yet computed.
inline Tensor gradient_like(const Tensor& tensor, const char* name) {
  return make_result(tensor, {tensor.sizes().begin(), tensor.sizes().end()}, torch_dtype(tensor), name);
}

/// The gradient of what nobody wants one of.
inline Tensor no_gradient(const Tensor& like) { return make_result(like, {0}, torch_dtype(like), "a gradient"); }

inline void set_to_zero(const Tensor& tensor) { TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(tensor.get())); }

/// The backward calls of some queries. Whoever wants gradients of both kinds runs `run_kv` first.
class BackwardCall {
 public:
  /// Whether both kinds are wanted: then the first call leaves delta to the second.
  BackwardCall(const BackwardTensors& tensors, const gnaforge_problem& problem, bool both)
      : given_q_(given(tensors.forward.q, "query")), problem_(problem), both_(both) {
    const ForwardTensors& forward = tensors.forward;
    std::vector<int64_t> rows(given_q_.sizes, given_q_.sizes + given_q_.dims - 1);
    check(tensors.lse, "lse", rows, ScalarType::Float);
    if (tensors.grad_lse) check(*tensors.grad_lse, "grad_lse", rows, ScalarType::Float);
    rows.push_back(problem_.value_head_dim);
    check(tensors.out, "out", rows, given_q_.dtype);
    check(tensors.grad_out, "grad_out", rows, given_q_.dtype);
    add(GNAFORGE_Q, forward.q, "query");
    add(GNAFORGE_K, forward.k, "key");
    add(GNAFORGE_V, forward.v, "value");
    add(GNAFORGE_OUT, tensors.out, "out");
    add(GNAFORGE_LSE, tensors.lse, "lse");
    add(GNAFORGE_GRAD_OUT, tensors.grad_out, "grad_out");
    if (tensors.grad_lse) add(GNAFORGE_GRAD_LSE, *tensors.grad_lse, "grad_lse");
    for (int i = 0; i < GNAFORGE_MAX_EXTRA; ++i) {
      if (problem_.extra_tokens[i] == 0) continue;
      const Piece& piece = forward.pieces[i];
      add(static_cast<gnaforge_role>(GNAFORGE_EXTRA_K + i), *piece.k, piece.names->k_name);
      add(static_cast<gnaforge_role>(GNAFORGE_EXTRA_V + i), *piece.v, piece.names->v_name);
      if (piece.lengths)
        add(static_cast<gnaforge_role>(GNAFORGE_EXTRA_LENGTHS + i), *piece.lengths, piece.names->lengths_name);
    }
  }

  /// The calls run in slices, made of `numbers` in a way that `kind` names: as Call::prepare_slices has it.
  void set_slices(char kind, std::vector<int64_t> numbers, std::function<Slices()> make) {
    slices_.emplace(OwnSlices{kind, std::move(numbers), std::move(make)});
  }

  /// Computes the gradients of all keys and values that the problem has; `adds`: to what is there.
  void run_kv(const std::vector<Gradient>& gradients, bool adds, std::string_view key) {
    Call call(GNAFORGE_GNA_BACKWARD_KV, problem_, given_q_);
    read(call);
    for (const Gradient& gradient : gradients) {
      call.write_into(gradient.role, gradient.tensor);
      if (adds) call.accumulate(gradient.role);
    }
    if (both_) {
      const auto sizes = tensors_[lse_].tensor.sizes();
      delta_ = call.write(GNAFORGE_DELTA, {sizes.begin(), sizes.end()}, aoti_torch_dtype_float32(), GNAFORGE_FP32);
    }
    if (!run(call, key) && !adds)  // where there are no queries, no kernel is asked
      for (const Gradient& gradient : gradients) set_to_zero(gradient.tensor);
  }

  void run_q(const Tensor& gradient, std::string_view key) {
    Call call(GNAFORGE_GNA_BACKWARD_Q, problem_, given_q_);
    read(call);
    call.write_into(GNAFORGE_GRAD_Q, gradient);
    run(call, key);
  }

 private:
  struct Input {
    gnaforge_role role;
    Tensor tensor;
  };
  struct OwnSlices {
    char kind;
    std::vector<int64_t> numbers;
    std::function<Slices()> make;
  };
  static constexpr size_t lse_ = 4;  // its place among tensors_

  static void check(const Tensor& tensor, const char* name, const std::vector<int64_t>& sizes, ScalarType dtype) {
    const Given found = given(tensor, name);
    bool same = found.dims == static_cast<int64_t>(sizes.size());
    for (size_t d = 0; same && d < sizes.size(); ++d) same = found.sizes[d] == sizes[d];
    if (!same) refuse(name, " has shape ", shape_text(found), ", it must be ", sizes_text(sizes.data(), sizes.size()));
    if (found.dtype != dtype) refuse(name, " is ", type_name(found.dtype), ", it must be ", type_name(dtype));
  }

  /// Gradients come with any strides, those of an expanded number are 0: none of it is the user's doing.
  void add(gnaforge_role role, const Tensor& tensor, const char* name) {
    const int64_t last = tensor.dim() - 1;
    const bool readable =
        role_facts[role].channels == Channels::none || tensor.size(last) == 1 || tensor.stride(last) == 1;
    tensors_.push_back({role, readable ? tensor : contiguous_copy(tensor, name)});
  }

  /// Delta, which the first of two kernels leaves, takes the place of what it follows from.
  void read(Call& call) const {
    for (const Input& input : tensors_)
      if (!delta_ || (input.role != GNAFORGE_OUT && input.role != GNAFORGE_GRAD_LSE))
        call.read(input.role, input.tensor);
    if (!delta_) return;
    call.read(GNAFORGE_DELTA, *delta_);
    call.need(GNAFORGE_FEATURE_DELTA);
  }

  /// False if there are no queries, and only the rules were looked at.
  bool run(Call& call, std::string_view key) const {
    if (has_no_rows(problem_)) {
      if (slices_)
        call.check_slices(slices_->make(), "", false);
      else
        call.check();
      return false;
    }
    if (slices_) {
      call.prepare_slices(key, slices_->kind, slices_->numbers, slices_->make);
      call.launch();
    } else {
      call.run(key);
    }
    return true;
  }

  const Given given_q_;
  const gnaforge_problem problem_;
  const bool both_;
  std::vector<Input> tensors_;
  std::optional<Tensor> delta_;
  std::optional<OwnSlices> slices_;
};

/// Gradients of Q, K, V, and of extra keys and values; each has a bit in what is wanted.
using Gradients = std::array<Tensor, 5>;
constexpr int64_t wanted_q = 1, wanted_kv = 2 | 4 | 8 | 16;

/// The gradients that are wanted of a call with one piece of extra keys at most; what isn't wanted has no elements.
inline Gradients run_backward(BackwardCall& call, const ForwardTensors& tensors, int64_t wanted, std::string_view key_q,
                              std::string_view key_kv) {
  Gradients found;
  const Piece& piece = tensors.pieces[0];
  const Tensor* const inputs[] = {&tensors.q, &tensors.k, &tensors.v, piece.k, piece.v};
  constexpr gnaforge_role roles[] = {GNAFORGE_GRAD_Q, GNAFORGE_GRAD_K, GNAFORGE_GRAD_V, GNAFORGE_GRAD_EXTRA_K,
                                     GNAFORGE_GRAD_EXTRA_V};
  const auto make = [&](size_t i) { found[i] = gradient_like(*inputs[i], role_facts[roles[i]].name); };
  if (wanted & wanted_kv) {
    std::vector<Gradient> gradients;
    for (size_t i = 1; i < found.size(); ++i) {
      if (inputs[i] == nullptr) continue;
      make(i);
      if (i < 3 || piece.k->size(1) > 0) gradients.push_back({roles[i], found[i]});
    }
    call.run_kv(gradients, false, key_kv);
  }
  if (wanted & wanted_q) {
    make(0);
    call.run_q(found[0], key_q);
  }
  for (size_t i = 0; i < found.size(); ++i)
    if (!(wanted >> i & 1)) found[i] = no_gradient(tensors.q);
  return found;
}

constexpr bool wants_both(int64_t wanted) { return (wanted & wanted_q) && (wanted & wanted_kv); }

inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const std::vector<int64_t>& pattern, std::optional<double> scale,
    int64_t wanted, StringHandle key_q, StringHandle key_kv, const std::optional<Tensor>& extra_k,
    const std::optional<Tensor>& extra_v, const std::optional<Tensor>& extra_lengths) {
  const Text pinned_q(key_q), pinned_kv(key_kv);
  const ForwardTensors tensors{q, k, v, {{pointer_to(extra_k), pointer_to(extra_v), pointer_to(extra_lengths)}, {}}};
  const GivenForward given = tensors.given();
  const gnaforge_problem problem = gather_first(given, pattern, scale);
  BackwardCall call({tensors, out, lse, grad_out, pointer_to(grad_lse)}, problem, wants_both(wanted));
  if (head_patterns(given.q, pattern.size()) > 1)
    call.set_slices('h', pattern,
                    [&] { return slices_of_heads(given, problem, pattern.data(), pattern.size(), scale); });
  return std::tuple_cat(run_backward(call, tensors, wanted, pinned_q.view(), pinned_kv.view()));
}

}  // namespace gnaforge
