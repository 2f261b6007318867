// The backward pass of joint attention: that of the image's rows and of text's, whose gradients of keys are sums.
//
// All rows see the image's keys, each its own part of them, and the text's. The first call writes gradients of all
// keys, those that follow add theirs. Text rows come first: what image rows add is rounded once.
#pragma once

#include <array>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "backward.h"
#include "joint.h"

namespace gnaforge {

constexpr const char* joint_backward_signature =
    "(Tensor q, Tensor k, Tensor v, int[] pattern, float? scale, int wanted, Tensor out, Tensor lse, Tensor? grad_out, "
    "Tensor? grad_lse, Tensor? text_q=None, Tensor? text_k=None, Tensor? text_v=None, Tensor? text_lengths=None, "
    "Tensor? text_out=None, Tensor? text_lse=None, Tensor? text_grad_out=None, Tensor? text_grad_lse=None, "
    "Tensor? more_q=None, Tensor? more_k=None, Tensor? more_v=None, Tensor? more_lengths=None, Tensor? more_out=None, "
    "Tensor? more_lse=None, Tensor? more_grad_out=None, Tensor? more_grad_lse=None, str key_q=\"\", str key_kv=\"\", "
    "str text_key_q=\"\", str text_key_kv=\"\") "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";

/// Rows of the image or of a text, what the forward pass made of them, and the gradients of that: null where there are
/// none, so that these rows have nothing to say of others'.
struct JointRows {
  const Tensor *q, *k, *v, *lengths, *out, *lse, *grad_out, *grad_lse;
  const GivenPiece* names;
};

/// The keys of the kernels for some rows.
struct JointKeys {
  std::string_view q, kv;
};

/// Gradients of q, k and v: of the image, then of each text; each has a bit in what is wanted.
class JointBackward {
 public:
  static constexpr int64_t all_q = 1 | 1 << 3 | 1 << 6, all_kv = 0x1ff & ~all_q;

  JointBackward(const JointRows& image, const JointRows (&texts)[GNAFORGE_MAX_EXTRA],
                const std::vector<int64_t>& pattern, std::optional<double> scale, int64_t wanted)
      : image_(image), texts_(texts), pattern_(pattern), scale_(scale), wanted_(wanted) {
    for (int i = 0; i < GNAFORGE_MAX_EXTRA; ++i) {
      const JointRows& text = texts[i];
      if ((text.q != nullptr) != (text.k != nullptr))
        refuse("query of a text and ", text.names->k_name, " come together");
      if (text.k == nullptr) continue;
      if (text.out == nullptr || text.lse == nullptr) refuse("a text has keys, but no output or log-sum-exp");
      pieces_[i] = {text.k, text.v, text.lengths, text.names};
    }
  }

  std::array<Tensor, 9> run(const JointKeys& key, const JointKeys& text_key) {
    const ForwardTensors tensors{*image_.q, *image_.k, *image_.v, {pieces_[0], pieces_[1]}};
    const GivenForward given = tensors.given();
    const gnaforge_problem problem = gather_first(given, pattern_, scale_);
    int64_t tokens = 1;
    for (int d = 0; d < problem.rank; ++d) tokens *= problem.tokens[d];
    make_gradients();
    const Tensor flat_k = flat_tokens(*image_.k, problem.rank, tokens, "key");
    const Tensor flat_v = flat_tokens(*image_.v, problem.rank, tokens, "value");
    for (int i = 0; i < GNAFORGE_MAX_EXTRA; ++i) {
      const JointRows& text = texts_[i];
      if (text.q == nullptr) continue;
      const ForwardTensors rows{*text.q, flat_k, flat_v, {pieces_[0], pieces_[1]}};
      const int64_t dense[] = {tokens, 1, 1, 0};
      const GivenForward given_rows = rows.given();
      const gnaforge_problem own = gather(given_rows, dense, plain_groups, scale_);
      for_part("text rows", [&] { run_rows(text, rows, own, i + 1, nullptr, text_key); });
    }
    const auto slices = [&] { return slices_of_heads(given, problem, pattern_.data(), pattern_.size(), scale_); };
    const std::function<Slices()> make_slices = slices;
    const bool sliced = head_patterns(given.q, pattern_.size()) > 1;
    for_part("image rows", [&] { run_rows(image_, tensors, problem, 0, sliced ? &make_slices : nullptr, key); });
    if (!summed_)
      for (const size_t i : {1, 2, 4, 5, 7, 8})
        if (inputs_[i] != nullptr && (wanted_ & all_kv)) set_to_zero(found_[i]);
    for (size_t i = 0; i < found_.size(); ++i)
      if (!(wanted_ >> i & 1)) found_[i] = no_gradient(*image_.q);
    return found_;
  }

 private:
  /// Of everything that kernels write. They write gradients of all keys, or of none.
  void make_gradients() {
    const JointRows* const rows[] = {&image_, &texts_[0], &texts_[1]};
    for (size_t i = 0; i < found_.size(); ++i) {
      const JointRows& own = *rows[i / 3];
      inputs_[i] = i % 3 == 0 ? own.q : i % 3 == 1 ? own.k : own.v;
      const bool is_q = i % 3 == 0;
      if (inputs_[i] != nullptr && (is_q ? wanted_ >> i & 1 : (wanted_ & all_kv) != 0))
        found_[i] = gradient_like(*inputs_[i], is_q ? "grad_q" : "the gradient of keys or values");
    }
  }

  void run_rows(const JointRows& rows, const ForwardTensors& tensors, const gnaforge_problem& problem, int part,
                const std::function<Slices()>* slices, const JointKeys& key) {
    const size_t q = static_cast<size_t>(part) * 3;
    const bool wants_q = wanted_ >> q & 1, wants_kv = wanted_ & all_kv;
    if (rows.grad_out == nullptr) {
      if (wants_q) set_to_zero(found_[q]);
      return;
    }
    BackwardCall call({tensors, *rows.out, *rows.lse, *rows.grad_out, rows.grad_lse}, problem, wants_q && wants_kv);
    if (slices != nullptr) call.set_slices('h', pattern_, *slices);
    if (wants_kv) {
      std::vector<Gradient> gradients{{GNAFORGE_GRAD_K, as_keys(1, tensors.k)},
                                      {GNAFORGE_GRAD_V, as_keys(2, tensors.v)}};
      for (int i = 0; i < GNAFORGE_MAX_EXTRA; ++i) {
        if (problem.extra_tokens[i] == 0) continue;
        const size_t k = static_cast<size_t>(i + 1) * 3 + 1;
        gradients.push_back({static_cast<gnaforge_role>(GNAFORGE_GRAD_EXTRA_K + i), found_[k]});
        gradients.push_back({static_cast<gnaforge_role>(GNAFORGE_GRAD_EXTRA_V + i), found_[k + 1]});
      }
      call.run_kv(gradients, summed_, key.kv);
      summed_ = true;
    }
    if (wants_q) call.run_q(found_[q], key.q);
  }

  /// A gradient of the image's keys or values, with the token dims that rows see them with.
  Tensor as_keys(size_t i, const Tensor& like) const {
    const Tensor& whole = found_[i];
    if (whole.dim() == like.dim()) return whole;
    return flat_tokens(whole, static_cast<int>(whole.dim()) - 3, like.size(1), "a gradient");
  }

  const JointRows& image_;
  const JointRows (&texts_)[GNAFORGE_MAX_EXTRA];
  const std::vector<int64_t>& pattern_;
  const std::optional<double> scale_;
  const int64_t wanted_;
  Piece pieces_[GNAFORGE_MAX_EXTRA];
  const Tensor* inputs_[9] = {};
  std::array<Tensor, 9> found_;
  bool summed_ = false;  // whether gradients of keys hold those of some rows
};

inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> joint_backward(
    const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<int64_t>& pattern, std::optional<double> scale,
    int64_t wanted, const Tensor& out, const Tensor& lse, const std::optional<Tensor>& grad_out,
    const std::optional<Tensor>& grad_lse, const std::optional<Tensor>& text_q, const std::optional<Tensor>& text_k,
    const std::optional<Tensor>& text_v, const std::optional<Tensor>& text_lengths,
    const std::optional<Tensor>& text_out, const std::optional<Tensor>& text_lse,
    const std::optional<Tensor>& text_grad_out, const std::optional<Tensor>& text_grad_lse,
    const std::optional<Tensor>& more_q, const std::optional<Tensor>& more_k, const std::optional<Tensor>& more_v,
    const std::optional<Tensor>& more_lengths, const std::optional<Tensor>& more_out,
    const std::optional<Tensor>& more_lse, const std::optional<Tensor>& more_grad_out,
    const std::optional<Tensor>& more_grad_lse, StringHandle key_q, StringHandle key_kv, StringHandle text_key_q,
    StringHandle text_key_kv) {
  const Text pinned_q(key_q), pinned_kv(key_kv), pinned_text_q(text_key_q), pinned_text_kv(text_key_kv);
  const JointRows image{&q, &k, &v, nullptr, &out, &lse, pointer_to(grad_out), pointer_to(grad_lse), nullptr};
  const JointRows texts[] = {
      {pointer_to(text_q), pointer_to(text_k), pointer_to(text_v), pointer_to(text_lengths), pointer_to(text_out),
       pointer_to(text_lse), pointer_to(text_grad_out), pointer_to(text_grad_lse), &prefix_names},
      {pointer_to(more_q), pointer_to(more_k), pointer_to(more_v), pointer_to(more_lengths), pointer_to(more_out),
       pointer_to(more_lse), pointer_to(more_grad_out), pointer_to(more_grad_lse), &suffix_names}};
  return std::tuple_cat(JointBackward(image, texts, pattern, scale, wanted)
                            .run({pinned_q.view(), pinned_kv.view()}, {pinned_text_q.view(), pinned_text_kv.view()}));
}

}  // namespace gnaforge
