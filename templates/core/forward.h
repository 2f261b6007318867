// A forward call of torch's tensors: its inputs as kernels read them, its results new or the caller's.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "call.h"
#include "given.h"
#include "slices.h"

namespace gnaforge {

/// An operator's `str` argument, which is its to free. Torch's own conversion to std::string leaks that string.
class Text {
 public:
  explicit Text(StringHandle handle) : handle_(handle) {}
  Text(const Text&) = delete;
  Text& operator=(const Text&) = delete;
  ~Text() { torch_delete_string(handle_); }

  std::string_view view() const {
    const char* data = nullptr;
    size_t length = 0;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle_, &data));
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle_, &length));
    return {data, length};
  }

 private:
  StringHandle handle_;
};

/// Kernels need contiguous channels and strides >= 0, which torch guarantees; anything else is copied.
inline Tensor with_contiguous_channels(const Tensor& tensor, const char* name) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) == 1 || tensor.stride(last) == 1) return tensor;
  static std::atomic<bool> noted{false};
  if (!noted.exchange(true)) note_copy(std::string("the last dimension of ") + name + " is not contiguous");
  return contiguous_copy(tensor, name);
}

/// A piece of extra keys as an operator is given it: null where it isn't.
struct Piece {
  const Tensor *k = nullptr, *v = nullptr, *lengths = nullptr;
  const GivenPiece* names = &no_piece;

  GivenPiece given() const {
    GivenPiece found = *names;
    if (k != nullptr) found.k = gnaforge::given(*k, names->k_name);
    if (v != nullptr) found.v = gnaforge::given(*v, names->v_name);
    if (lengths != nullptr) found.lengths = gnaforge::given(*lengths, names->lengths_name);
    return found;
  }
};

inline const Tensor* pointer_to(const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; }

/// The tensors of a forward call as an operator is given them; they are the caller's.
struct ForwardTensors {
  const Tensor &q, &k, &v;
  Piece pieces[GNAFORGE_MAX_EXTRA];
  const char *q_name = "query", *k_name = "key", *v_name = "value";

  GivenForward given() const {
    return {gnaforge::given(q, q_name),
            gnaforge::given(k, k_name),
            gnaforge::given(v, v_name),
            {pieces[0].given(), pieces[1].given()}};
  }
};

/// A view of a tensor's memory from its element `offset` on: torch adds that to the tensor's own.
inline Tensor view_of(const Tensor& tensor, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                      int64_t offset) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(tensor.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
                                                        strides.data(), offset, &handle));
  return Tensor(handle);
}

inline int32_t torch_dtype(const Tensor& tensor) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

inline int64_t last_stride(const Tensor& tensor) { return tensor.dim() > 0 ? tensor.stride(tensor.dim() - 1) : 1; }

/// Whether a call has nothing to compute.
inline bool has_no_rows(const gnaforge_problem& problem) {
  const Sizes sizes = sizes_of(problem, GNAFORGE_LSE);
  bool empty = sizes.batch == 0 || sizes.heads == 0;
  for (const int64_t tokens : sizes.tokens) empty = empty || tokens == 0;
  return empty;
}

/// Sizes of the output: the query's, with the values' channels.
inline std::vector<int64_t> output_sizes(const Given& q, const gnaforge_problem& problem) {
  std::vector<int64_t> sizes(q.sizes, q.sizes + q.dims);
  sizes.back() = problem.value_head_dim;
  return sizes;
}

inline std::vector<int64_t> without_channels(std::vector<int64_t> sizes) {
  sizes.pop_back();
  return sizes;
}

/// Tensors of the caller's for the results of a forward call.
struct ForwardResults {
  const Tensor &out, &lse;
};

/// A forward call whose inputs are bound to `call`. Results come then; and it runs.
class ForwardCall {
 public:
  ForwardCall(const ForwardTensors& tensors, const GivenForward& given, const gnaforge_problem& problem)
      : problem_(problem),
        q_(with_contiguous_channels(tensors.q, tensors.q_name)),
        k_(with_contiguous_channels(tensors.k, tensors.k_name)),
        v_(with_contiguous_channels(tensors.v, tensors.v_name)),
        call(GNAFORGE_GNA_FORWARD, problem_, given.q) {
    call.read(GNAFORGE_Q, q_);
    call.read(GNAFORGE_K, k_);
    call.read(GNAFORGE_V, v_);
    for (int i = 0; i < GNAFORGE_MAX_EXTRA; ++i)
      if (problem.extra_tokens[i] > 0) read_piece(tensors.pieces[i], i);
  }

  /// New tensors for the output and the log-sum-exp.
  std::pair<Tensor, Tensor> make_results(const Given& q) {
    const std::vector<int64_t> sizes = output_sizes(q, problem_);
    Tensor out = call.write(GNAFORGE_OUT, sizes, torch_dtype(q_), call.dtype_of(GNAFORGE_Q));
    Tensor lse = call.write(GNAFORGE_LSE, without_channels(sizes), aoti_torch_dtype_float32(), GNAFORGE_FP32);
    return {std::move(out), std::move(lse)};
  }

  /// Those of the caller's.
  void take_results(const Given& q, const ForwardResults& results) {
    check_results(given(results.out, "out"), last_stride(results.out), given(results.lse, "out_lse"), q,
                  output_sizes(q, problem_));
    call.write_into(GNAFORGE_OUT, results.out);
    call.write_into(GNAFORGE_LSE, results.lse);
  }

  /// Says that heads have patterns of their own, if `pattern` has the numbers of as many; it outlives the run.
  void set_patterns(const GivenForward& given, const std::vector<int64_t>& pattern, std::optional<double> scale) {
    if (head_patterns(given.q, pattern.size()) > 1) own_.emplace(OwnPatterns{given, pattern, scale});
  }

  /// Runs the call, or if it has no results only looks at its rules.
  void run(std::string_view key) {
    if (has_no_rows(problem_)) return check();
    prepare(key);
    call.launch();
  }

  void prepare(std::string_view key) {
    if (own_)
      call.prepare_slices(key, 'h', own_->numbers, [&] { return slices(); });
    else
      call.prepare(key);
  }

  void check() const {
    if (own_)
      call.check_slices(slices(), "", false);
    else
      call.check();
  }

 private:
  void read_piece(const Piece& piece, int i) {
    const Tensor& k = more_[2 * i].emplace(with_contiguous_channels(*piece.k, piece.names->k_name));
    const Tensor& v = more_[2 * i + 1].emplace(with_contiguous_channels(*piece.v, piece.names->v_name));
    call.read(static_cast<gnaforge_role>(GNAFORGE_EXTRA_K + i), k);
    call.read(static_cast<gnaforge_role>(GNAFORGE_EXTRA_V + i), v);
    if (piece.lengths != nullptr) call.read(static_cast<gnaforge_role>(GNAFORGE_EXTRA_LENGTHS + i), *piece.lengths);
  }

  struct OwnPatterns {
    GivenForward given;
    const std::vector<int64_t>& numbers;
    std::optional<double> scale;
  };

  Slices slices() const {
    return slices_of_heads(own_->given, problem_, own_->numbers.data(), own_->numbers.size(), own_->scale);
  }

  gnaforge_problem problem_;
  std::optional<OwnPatterns> own_;
  Tensor q_, k_, v_;
  std::optional<Tensor> more_[2 * GNAFORGE_MAX_EXTRA];

 public:
  Call call;
};

}  // namespace gnaforge
