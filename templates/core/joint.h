// Joint attention of an image and text: two or three forward calls that write into one output, nothing copied between.
//
// Image rows see their window and the text; text rows see the image, as one dense axis of its tokens, and the text.
// Text rows are launched first, since they are few and long; the image rows' launch may begin beside them.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "forward.h"

namespace gnaforge {

#define GNAFORGE_JOINT_ARGUMENTS                                                                       \
  "Tensor q, Tensor k, Tensor v, int[] pattern, float? scale=None, str key=\"\", str text_key=\"\", "  \
  "Tensor? prefix_q=None, Tensor? prefix_k=None, Tensor? prefix_v=None, Tensor? prefix_lengths=None, " \
  "Tensor? suffix_q=None, Tensor? suffix_k=None, Tensor? suffix_v=None, Tensor? suffix_lengths=None"
#define GNAFORGE_JOINT_APART_ARGUMENTS                                                 \
  "Tensor q, Tensor k, Tensor v, int[] pattern, float? scale, str key, str text_key, " \
  "Tensor text_q, Tensor text_k, Tensor text_v, Tensor? text_lengths=None"
constexpr const char* joint_signature = "(" GNAFORGE_JOINT_ARGUMENTS ") -> (Tensor, Tensor)";
constexpr const char* joint_out_signature =
    "(" GNAFORGE_JOINT_ARGUMENTS ", *, Tensor(a!) output, Tensor(b!) output_lse) -> ()";
constexpr const char* joint_apart_signature =
    "(" GNAFORGE_JOINT_APART_ARGUMENTS ") -> (Tensor, Tensor, Tensor, Tensor)";
constexpr const char* joint_apart_out_signature =
    "(" GNAFORGE_JOINT_APART_ARGUMENTS
    ", *, Tensor(a!) output, Tensor(b!) output_lse, Tensor(c!) output_text, "
    "Tensor(d!) output_text_lse) -> ()";
#undef GNAFORGE_JOINT_ARGUMENTS
#undef GNAFORGE_JOINT_APART_ARGUMENTS

/// Text tokens: queries, and the piece of keys that all rows see.
struct TextRows {
  const Tensor* q;
  const char* q_name;
  Piece piece;
};

constexpr GivenPiece prefix_names{"key of the prefix", "value of the prefix", "lengths of the prefix", {}, {}, {}};
constexpr GivenPiece suffix_names{"key of the suffix", "value of the suffix", "lengths of the suffix", {}, {}, {}};
constexpr GivenPiece text_names{"text_k", "text_v", "text_lengths", {}, {}, {}};

/// Keys or values of the image with one token dim; copied where its tokens don't lie one distance apart.
inline Tensor flat_tokens(const Tensor& tensor, int rank, int64_t tokens, const char* name) {
  const auto flatten = [&](const Tensor& from, int64_t step) {
    const int64_t heads = rank + 1, channels = rank + 2;
    return view_of(from, {from.size(0), tokens, from.size(heads), from.size(channels)},
                   {from.stride(0), step, from.stride(heads), from.stride(channels)}, 0);
  };
  // Along a dim of one token the stride means nothing.
  std::optional<int64_t> step;
  int64_t next = 0;
  bool even = true;
  for (int d = rank; d >= 1; --d) {
    if (tensor.size(d) == 1) continue;
    if (!step) step = next = tensor.stride(d);
    even = even && tensor.stride(d) == next;
    next *= tensor.size(d);
  }
  if (even) return flatten(tensor, step.value_or(tensor.stride(rank)));
  static std::atomic<bool> noted{false};
  if (!noted.exchange(true)) note_copy(std::string("the tokens of ") + name + " don't lie one distance apart");
  const Tensor copy = contiguous_copy(tensor, name);
  return flatten(copy, copy.stride(rank));
}

/// Runs a step of one part of the work, whose name its errors begin with, but for those of bad input.
template <class Step>
void for_part(const char* part, Step step) {
  try {
    step();
  } catch (const std::runtime_error& thrown) {
    const LastError error = last_error();
    if (error.text != thrown.what() || error.code == ErrorCode::bad_input) throw;
    raise(error.code, std::string(part) + ": " + error.text.substr(error.begin, error.end - error.begin),
          error.text.substr(error.end));
  }
}

/// The calls of joint attention. What it is given outlives it.
class JointCalls {
 public:
  JointCalls(const Tensor& q, const Tensor& k, const Tensor& v, const TextRows (&texts)[2],
             const std::vector<int64_t>& pattern, std::optional<double> scale) {
    const Piece pieces[2] = {texts[0].piece, texts[1].piece};
    const ForwardTensors image{q, k, v, {pieces[0], pieces[1]}};
    const GivenForward given = image.given();
    const gnaforge_problem problem = gather_first(given, pattern, scale);
    int64_t tokens = 1;
    for (int d = 0; d < problem.rank; ++d) tokens *= problem.tokens[d];
    if (tokens == 0) refuse("query has shape ", shape_text(given.q), "; an image has tokens");
    rank_ = problem.rank;
    image_sizes_ = output_sizes(given.q, problem);
    flat_k_.emplace(flat_tokens(k, rank_, tokens, "key"));
    flat_v_.emplace(flat_tokens(v, rank_, tokens, "value"));
    for (int i = 0; i < 2; ++i) {
      const TextRows& text = texts[i];
      if (text.q == nullptr && text.piece.k == nullptr) continue;
      if (text.q == nullptr || text.piece.k == nullptr)
        refuse(text.q_name, " and ", text.piece.names->k_name, " come together");
      const ForwardTensors rows{*text.q, *flat_k_, *flat_v_, {pieces[0], pieces[1]}, text.q_name};
      const GivenForward given_rows = rows.given();
      const int64_t dense[] = {tokens, 1, 1, 0};
      const gnaforge_problem own = gather(given_rows, dense, 4, scale);
      check_shape(given_rows.q, {problem.batch, problem.extra_tokens[i], problem.heads, problem.head_dim},
                  text.piece.names->k_name);
      texts_[i].tokens = own.tokens[0];
      if (!has_no_rows(own)) texts_[i].call = std::make_unique<ForwardCall>(rows, given_rows, own);
    }
    image_ = std::make_unique<ForwardCall>(image, given, problem);
    image_->set_patterns(given, pattern, scale);
    image_is_empty_ = has_no_rows(problem);
    channels_ = problem.value_head_dim;
    dtype_ = torch_dtype(q);
  }

  int64_t text_tokens(int i) const { return texts_[i].tokens; }
  int64_t batch() const { return image_sizes_.front(); }
  int64_t heads() const { return image_sizes_[image_sizes_.size() - 2]; }
  int64_t channels() const { return channels_; }
  int32_t dtype() const { return dtype_; }
  const std::vector<int64_t>& image_sizes() const { return image_sizes_; }

  int64_t image_tokens() const {
    int64_t tokens = 1;
    for (int d = 1; d <= rank_; ++d) tokens *= image_sizes_[static_cast<size_t>(d)];
    return tokens;
  }

  /// The image rows' results, in tensors that outlive the run.
  void write_image(const Tensor& out, const Tensor& lse) { write(*image_, out, lse); }

  /// Those of text rows.
  void write_text(int i, const Tensor& out, const Tensor& lse) {
    if (texts_[i].call) write(*texts_[i].call, out, lse);
  }

  /// Runs all calls. Kernels are found before the first of them is launched.
  void run(std::string_view key, std::string_view text_key) {
    std::vector<ForwardCall*> calls;
    for (Rows& text : texts_)
      if (text.call) calls.push_back(text.call.get());
    if (!image_is_empty_)
      calls.push_back(image_.get());
    else
      image_->check();
    for (ForwardCall* forward : calls) {
      const bool is_image = forward == image_.get();
      if (forward != calls.front()) forward->call.run_beside_last();
      for_part(is_image ? "image rows" : "text rows", [&] { forward->prepare(is_image ? key : text_key); });
    }
    for (ForwardCall* forward : calls) forward->call.launch();
  }

 private:
  struct Rows {
    std::unique_ptr<ForwardCall> call;
    int64_t tokens = 0;
  };

  static void write(ForwardCall& forward, const Tensor& out, const Tensor& lse) {
    forward.call.write_into(GNAFORGE_OUT, out);
    forward.call.write_into(GNAFORGE_LSE, lse);
  }

  int rank_;
  std::optional<Tensor> flat_k_, flat_v_;
  std::unique_ptr<ForwardCall> image_;
  Rows texts_[2];
  std::vector<int64_t> image_sizes_;
  bool image_is_empty_;
  int64_t channels_;
  int32_t dtype_;
};

/// Rows of a packed result [batch, tokens, heads, channels], or without channels: as many as `sizes` has tokens, from
/// `begin` on.
inline Tensor rows_of(const Tensor& packed, const std::vector<int64_t>& sizes, int64_t begin) {
  const size_t rest = static_cast<size_t>(packed.dim()) - 2, tokens = sizes.size() - 1 - rest;
  std::vector<int64_t> strides(sizes.size());
  strides[0] = packed.stride(0);
  int64_t step = packed.stride(1);
  for (size_t d = tokens; d >= 1; step *= sizes[d--]) strides[d] = step;
  for (size_t d = 0; d < rest; ++d) strides[1 + tokens + d] = packed.stride(static_cast<int64_t>(2 + d));
  return view_of(packed, sizes, strides, begin * packed.stride(1));
}

/// A call whose results hold all tokens: [batch, prefix + image + suffix, heads, channels] and the same without
/// channels. What it is given outlives it.
class PackedJoint {
 public:
  PackedJoint(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<int64_t>& pattern,
              std::optional<double> scale, const std::optional<Tensor>& prefix_q, const std::optional<Tensor>& prefix_k,
              const std::optional<Tensor>& prefix_v, const std::optional<Tensor>& prefix_lengths,
              const std::optional<Tensor>& suffix_q, const std::optional<Tensor>& suffix_k,
              const std::optional<Tensor>& suffix_v, const std::optional<Tensor>& suffix_lengths)
      : texts_{{pointer_to(prefix_q),
                "query of the prefix",
                {pointer_to(prefix_k), pointer_to(prefix_v), pointer_to(prefix_lengths), &prefix_names}},
               {pointer_to(suffix_q),
                "query of the suffix",
                {pointer_to(suffix_k), pointer_to(suffix_v), pointer_to(suffix_lengths), &suffix_names}}},
        calls_(q, k, v, texts_, pattern, scale),
        sizes_{calls_.batch(), calls_.text_tokens(0) + calls_.image_tokens() + calls_.text_tokens(1), calls_.heads(),
               calls_.channels()} {}

  const std::vector<int64_t>& sizes() const { return sizes_; }
  int32_t dtype() const { return calls_.dtype(); }

  void run(const Tensor& out, const Tensor& lse, std::string_view key, std::string_view text_key) {
    const int64_t prefix = calls_.text_tokens(0), image = calls_.image_tokens();
    std::vector<Tensor> views;
    for (const Tensor* packed : {&out, &lse}) {
      const auto part = [&](std::vector<int64_t> own, int64_t begin) {
        if (packed == &lse) own.pop_back();
        views.push_back(rows_of(*packed, own, begin));
      };
      part({sizes_[0], prefix, sizes_[2], sizes_[3]}, 0);
      part(calls_.image_sizes(), prefix);
      part({sizes_[0], calls_.text_tokens(1), sizes_[2], sizes_[3]}, prefix + image);
    }
    calls_.write_text(0, views[0], views[3]);
    calls_.write_image(views[1], views[4]);
    calls_.write_text(1, views[2], views[5]);
    calls_.run(key, text_key);
  }

 private:
  const TextRows texts_[2];
  JointCalls calls_;
  const std::vector<int64_t> sizes_;
};

inline std::tuple<Tensor, Tensor> joint(const Tensor& q, const Tensor& k, const Tensor& v,
                                        const std::vector<int64_t>& pattern, std::optional<double> scale,
                                        StringHandle key, StringHandle text_key, const std::optional<Tensor>& prefix_q,
                                        const std::optional<Tensor>& prefix_k, const std::optional<Tensor>& prefix_v,
                                        const std::optional<Tensor>& prefix_lengths,
                                        const std::optional<Tensor>& suffix_q, const std::optional<Tensor>& suffix_k,
                                        const std::optional<Tensor>& suffix_v,
                                        const std::optional<Tensor>& suffix_lengths) {
  const Text pinned(key), pinned_text(text_key);
  PackedJoint call(q, k, v, pattern, scale, prefix_q, prefix_k, prefix_v, prefix_lengths, suffix_q, suffix_k, suffix_v,
                   suffix_lengths);
  Tensor out = make_result(q, call.sizes(), call.dtype(), "out");
  Tensor lse = make_result(q, without_channels(call.sizes()), aoti_torch_dtype_float32(), "log_sum_exp");
  call.run(out, lse, pinned.view(), pinned_text.view());
  return {out, lse};
}

/// As `joint`, with results in tensors of the caller's.
inline void joint_out(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<int64_t>& pattern,
                      std::optional<double> scale, StringHandle key, StringHandle text_key,
                      const std::optional<Tensor>& prefix_q, const std::optional<Tensor>& prefix_k,
                      const std::optional<Tensor>& prefix_v, const std::optional<Tensor>& prefix_lengths,
                      const std::optional<Tensor>& suffix_q, const std::optional<Tensor>& suffix_k,
                      const std::optional<Tensor>& suffix_v, const std::optional<Tensor>& suffix_lengths,
                      const Tensor& out, const Tensor& lse) {
  const Text pinned(key), pinned_text(text_key);
  PackedJoint call(q, k, v, pattern, scale, prefix_q, prefix_k, prefix_v, prefix_lengths, suffix_q, suffix_k, suffix_v,
                   suffix_lengths);
  check_results(given(out, "out"), last_stride(out), given(lse, "out_lse"), given(q, "query"), call.sizes());
  call.run(out, lse, pinned.view(), pinned_text.view());
}

/// A call of tensors that are apart: results of the image, and of the text.
class ApartJoint {
 public:
  ApartJoint(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<int64_t>& pattern,
             std::optional<double> scale, const Tensor& text_q, const Tensor& text_k, const Tensor& text_v,
             const std::optional<Tensor>& text_lengths)
      : texts_{{&text_q, "text_q", {&text_k, &text_v, pointer_to(text_lengths), &text_names}}, {nullptr, "", {}}},
        calls_(q, k, v, texts_, pattern, scale),
        text_sizes_{calls_.batch(), calls_.text_tokens(0), calls_.heads(), calls_.channels()} {}

  const std::vector<int64_t>& sizes() const { return calls_.image_sizes(); }
  const std::vector<int64_t>& text_sizes() const { return text_sizes_; }
  int32_t dtype() const { return calls_.dtype(); }

  void run(const Tensor& out, const Tensor& lse, const Tensor& text_out, const Tensor& text_lse, std::string_view key,
           std::string_view text_key) {
    calls_.write_image(out, lse);
    calls_.write_text(0, text_out, text_lse);
    calls_.run(key, text_key);
  }

 private:
  const TextRows texts_[2];
  JointCalls calls_;
  const std::vector<int64_t> text_sizes_;
};

inline std::tuple<Tensor, Tensor, Tensor, Tensor> joint_apart(const Tensor& q, const Tensor& k, const Tensor& v,
                                                              const std::vector<int64_t>& pattern,
                                                              std::optional<double> scale, StringHandle key,
                                                              StringHandle text_key, const Tensor& text_q,
                                                              const Tensor& text_k, const Tensor& text_v,
                                                              const std::optional<Tensor>& text_lengths) {
  const Text pinned(key), pinned_text(text_key);
  ApartJoint call(q, k, v, pattern, scale, text_q, text_k, text_v, text_lengths);
  const int32_t fp32 = aoti_torch_dtype_float32();
  Tensor out = make_result(q, call.sizes(), call.dtype(), "out");
  Tensor lse = make_result(q, without_channels(call.sizes()), fp32, "log_sum_exp");
  Tensor text_out = make_result(q, call.text_sizes(), call.dtype(), "text_out");
  Tensor text_lse = make_result(q, without_channels(call.text_sizes()), fp32, "log_sum_exp of text_out");
  call.run(out, lse, text_out, text_lse, pinned.view(), pinned_text.view());
  return {out, lse, text_out, text_lse};
}

/// As `joint_apart`, with results in tensors of the caller's.
inline void joint_apart_out(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<int64_t>& pattern,
                            std::optional<double> scale, StringHandle key, StringHandle text_key, const Tensor& text_q,
                            const Tensor& text_k, const Tensor& text_v, const std::optional<Tensor>& text_lengths,
                            const Tensor& out, const Tensor& lse, const Tensor& text_out, const Tensor& text_lse) {
  const Text pinned(key), pinned_text(text_key);
  ApartJoint call(q, k, v, pattern, scale, text_q, text_k, text_v, text_lengths);
  const Given query = given(q, "query");
  check_results(given(out, "out"), last_stride(out), given(lse, "out_lse"), query, call.sizes());
  check_results(given(text_out, "text_out"), last_stride(text_out), given(text_lse, "text_out_lse"), query,
                call.text_sizes());
  call.run(out, lse, text_out, text_lse, pinned.view(), pinned_text.view());
}

}  // namespace gnaforge
