// The backward pass of a call: gradients of Q, and of K and V, each by a kernel of its own.
#pragma once

#include <array>
#include <optional>
#include <string_view>
#include <vector>

#include "forward.h"

namespace gnaforge {

/// Gradients of Q, K, V, and of extra keys and values; each has a bit in what is wanted.
using Gradients = std::array<Tensor, 5>;
constexpr int64_t wanted_q = 1, wanted_kv = 2 | 4 | 8 | 16;

class BackwardCall {
 public:
  BackwardCall(const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k,
               const Tensor& v, const Tensor& out, const Tensor& lse, const std::vector<int64_t>& pattern,
               std::optional<double> scale, const std::optional<Tensor>& extra_k, const std::optional<Tensor>& extra_v,
               const std::optional<Tensor>& extra_lengths)
      : given_{given(q, "query"),
               given(k, "key"),
               given(v, "value"),
               {Piece{pointer_to(extra_k), pointer_to(extra_v), pointer_to(extra_lengths)}.given(), no_piece}},
        problem_(gather(given_, pattern.data(), pattern.size(), scale)) {
    const Given& like = given_.q;
    std::vector<int64_t> rows(like.sizes, like.sizes + like.dims - 1);
    check(lse, "lse", rows, ScalarType::Float);
    if (grad_lse) check(*grad_lse, "grad_lse", rows, ScalarType::Float);
    rows.push_back(problem_.value_head_dim);
    check(out, "out", rows, like.dtype);
    check(grad_out, "grad_out", rows, like.dtype);
    add(GNAFORGE_Q, q, "query");
    add(GNAFORGE_K, k, "key");
    add(GNAFORGE_V, v, "value");
    add(GNAFORGE_OUT, out, "out");
    add(GNAFORGE_LSE, lse, "lse");
    add(GNAFORGE_GRAD_OUT, grad_out, "grad_out");
    if (grad_lse) add(GNAFORGE_GRAD_LSE, *grad_lse, "grad_lse");
    if (problem_.extra_tokens[0] == 0) return;
    add(GNAFORGE_EXTRA_K, *extra_k, no_piece.k_name);
    add(GNAFORGE_EXTRA_V, *extra_v, no_piece.v_name);
    if (extra_lengths) add(GNAFORGE_EXTRA_LENGTHS, *extra_lengths, no_piece.lengths_name);
  }

  /// What isn't wanted has no elements.
  Gradients run(int64_t wanted, std::string_view key_q, std::string_view key_kv) {
    const bool both = (wanted & wanted_q) && (wanted & wanted_kv);
    Gradients gradients;
    if (wanted & wanted_kv) {
      Call call(GNAFORGE_GNA_BACKWARD_KV, problem_, given_.q);
      read(call);
      std::vector<Tensor*> results{&gradients[1], &gradients[2]};
      gradients[1] = write(call, GNAFORGE_GRAD_K, GNAFORGE_K);
      gradients[2] = write(call, GNAFORGE_GRAD_V, GNAFORGE_V);
      if (problem_.extra_tokens[0] > 0) {
        gradients[3] = write(call, GNAFORGE_GRAD_EXTRA_K, GNAFORGE_EXTRA_K);
        gradients[4] = write(call, GNAFORGE_GRAD_EXTRA_V, GNAFORGE_EXTRA_V);
        results.insert(results.end(), {&gradients[3], &gradients[4]});
      }
      if (both) delta_ = write(call, GNAFORGE_DELTA, GNAFORGE_LSE);
      finish(call, key_kv, results);
    }
    if (wanted & wanted_q) {
      Call call(GNAFORGE_GNA_BACKWARD_Q, problem_, given_.q);
      read(call);
      gradients[0] = write(call, GNAFORGE_GRAD_Q, GNAFORGE_Q);
      finish(call, key_q, {&gradients[0]});
    }
    for (size_t i = 0; i < gradients.size(); ++i)
      if (!(wanted >> i & 1)) gradients[i] = Tensor(try_empty(tensors_[0].tensor, {0}, dtype_));
    return gradients;
  }

 private:
  struct Input {
    gnaforge_role role;
    Tensor tensor;
  };

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
    if (tensors_.empty()) TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype_));
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

  Tensor write(Call& call, gnaforge_role role, gnaforge_role like) const {
    for (const Input& input : tensors_)
      if (input.role == like) {
        int32_t dtype = 0;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(input.tensor.get(), &dtype));
        const auto sizes = input.tensor.sizes();
        return call.write(role, {sizes.begin(), sizes.end()}, dtype, call.dtype_of(like));
      }
    raise(ErrorCode::other, "no tensor to be like");
  }

  /// Where there are no queries, no kernel is asked: gradients of keys are 0.
  void finish(Call& call, std::string_view key, const std::vector<Tensor*>& results) const {
    if (tensors_[0].tensor.numel() != 0) return call.run(key);
    call.check();
    for (Tensor* const result : results) TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(result->get()));
  }

  const GivenForward given_;
  const gnaforge_problem problem_;
  int32_t dtype_ = 0;
  std::vector<Input> tensors_;
  std::optional<Tensor> delta_;
};

}  // namespace gnaforge
