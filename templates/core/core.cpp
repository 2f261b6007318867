// The core extension: registers gnaforge's operators with torch and runs kernels from the table.
//
// Built on the libtorch stable ABI (TORCH_TARGET_VERSION 2.10), so one binary serves every later torch and Python.
// There is no static registration: a second one for the same namespace would end the process, so gnaforge_core_init
// registers and checks every return code, and Python calls it once per process.
#include <cstdio>
#include <cstring>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "backward.h"
#include "call.h"
#include "given.h"

#define GNAFORGE_EXPORT extern "C" __attribute__((visibility("default")))

namespace gnaforge {
namespace {

constexpr const char* forward_signature =
    "(Tensor q, Tensor k, Tensor v, int[] pattern, float? scale=None, str key=\"\", Tensor? extra_k=None, "
    "Tensor? extra_v=None, Tensor? extra_lengths=None) -> (Tensor, Tensor)";
constexpr const char* backward_signature =
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int[] pattern, "
    "float? scale, int wanted, str key_q=\"\", str key_kv=\"\") -> (Tensor, Tensor, Tensor)";

using BoxedKernel = void (*)(StableIValue*, uint64_t, uint64_t);
struct Operator {
  const char* name;
  const char* signature;
  BoxedKernel kernel;
};

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
Tensor with_contiguous_channels(const Tensor& tensor, const char* name) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) == 1 || tensor.stride(last) == 1) return tensor;
  static std::atomic<bool> noted{false};
  if (!noted.exchange(true)) note_copy(std::string("the last dimension of ") + name + " is not contiguous");
  return contiguous_copy(tensor, name);
}

bool is_one_head(const Tensor& tensor, const gnaforge_problem& p) { return tensor.stride(p.rank + 1) == 0; }

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const std::vector<int64_t>& pattern, std::optional<double> scale,
                                   StringHandle pinned_key, const std::optional<Tensor>& extra_k,
                                   const std::optional<Tensor>& extra_v, const std::optional<Tensor>& extra_lengths) {
  const Text pinned(pinned_key);
  GivenForward tensors{given(query, "query"), given(key, "key"), given(value, "value"), {}, {}, {}};
  if (extra_k) tensors.extra_k = given(*extra_k, "extra_k");
  if (extra_v) tensors.extra_v = given(*extra_v, "extra_v");
  if (extra_lengths) tensors.extra_lengths = given(*extra_lengths, "extra_lengths");
  gnaforge_problem problem = gather(tensors, pattern.data(), pattern.size(), scale);
  const int64_t extra = problem.extra_tokens[0];
  // Heads of keys and values that are one, as `expand` makes them, are passed as one: no kernel need read them apart.
  if (extra == 0 && problem.kv_heads > 1 && problem.heads % problem.kv_heads == 0 && is_one_head(key, problem) &&
      is_one_head(value, problem))
    problem.kv_heads = 1;
  const Tensor q = with_contiguous_channels(query, "query");
  const Tensor k = with_contiguous_channels(key, "key");
  const Tensor v = with_contiguous_channels(value, "value");
  std::vector<Tensor> more;
  if (extra > 0) more = {with_contiguous_channels(*extra_k, "extra_k"), with_contiguous_channels(*extra_v, "extra_v")};

  Call call(GNAFORGE_GNA_FORWARD, problem, tensors.q);
  call.read(GNAFORGE_Q, q);
  call.read(GNAFORGE_K, k);
  call.read(GNAFORGE_V, v);
  if (extra > 0) {
    call.read(GNAFORGE_EXTRA_K, more[0]);
    call.read(GNAFORGE_EXTRA_V, more[1]);
    if (extra_lengths) call.read(GNAFORGE_EXTRA_LENGTHS, *extra_lengths);
  }
  std::vector<int64_t> shape(q.sizes().begin(), q.sizes().end());
  shape.back() = problem.value_head_dim;
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(q.get(), &dtype));
  Tensor out = call.write(GNAFORGE_OUT, shape, dtype, call.dtype_of(GNAFORGE_Q));
  shape.pop_back();
  Tensor lse = call.write(GNAFORGE_LSE, shape, aoti_torch_dtype_float32(), GNAFORGE_FP32);
  if (out.numel() == 0 && lse.numel() == 0)
    call.check();
  else
    call.run(pinned.view());
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const std::optional<Tensor>& grad_lse,
                                            const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                                            const Tensor& lse, const std::vector<int64_t>& pattern,
                                            std::optional<double> scale, int64_t wanted, StringHandle key_q,
                                            StringHandle key_kv) {
  const Text pinned_q(key_q), pinned_kv(key_kv);
  BackwardCall call(grad_out, grad_lse, q, k, v, out, lse, pattern, scale);
  auto [of_q, of_k, of_v] = call.run(wanted, pinned_q.view(), pinned_kv.view());
  return {std::move(of_q), std::move(of_k), std::move(of_v)};
}

/// What a forward call without data would be refused for: raises it. With `choose` also that no kernel fits it.
void check_forward(const GivenForward& tensors, const int64_t* pattern, size_t count, std::optional<double> scale,
                   std::string_view pinned, bool choose) {
  const gnaforge_problem problem = gather(tensors, pattern, count, scale);
  const uint32_t dtype = dtype_code(tensors.q.dtype);
  Call call(GNAFORGE_GNA_FORWARD, problem, tensors.q);
  for (const gnaforge_role role : {GNAFORGE_Q, GNAFORGE_K, GNAFORGE_V, GNAFORGE_OUT}) call.assume(role, dtype);
  call.assume(GNAFORGE_LSE, GNAFORGE_FP32);
  if (problem.extra_tokens[0] > 0) {
    for (const gnaforge_role role : {GNAFORGE_EXTRA_K, GNAFORGE_EXTRA_V}) call.assume(role, dtype);
    if (tensors.extra_lengths) call.assume(GNAFORGE_EXTRA_LENGTHS, GNAFORGE_INT32);
  }
  call.check();
  const Sizes lse = sizes_of(problem, GNAFORGE_LSE);
  bool empty = lse.batch == 0 || lse.heads == 0;
  for (const int64_t tokens : lse.tokens) empty = empty || tokens == 0;
  if (choose && !empty) call.choose_kernel(pinned);
}

int fail(char* text, size_t size, const std::string& reason) {
  std::snprintf(text, size, "%s", reason.c_str());
  return 1;
}

std::string json_string(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    char escaped[8];
    if (static_cast<unsigned char>(c) < 0x20) {
      std::snprintf(escaped, sizeof(escaped), "\\u%04x", c);
      out += escaped;
    } else {
      if (c == '"' || c == '\\') out += '\\';
      out += c;
    }
  }
  return out + "\"";
}

}  // namespace
}  // namespace gnaforge

/// ABI version that this core speaks.
GNAFORGE_EXPORT uint32_t gnaforge_core_abi() { return GNAFORGE_ABI_VERSION; }

/// Registers the operators. To be called once per process. 0 on success; else the reason is in error[0..n).
GNAFORGE_EXPORT int gnaforge_core_init(char* error, size_t n) {
  using namespace gnaforge;
  // forward_no_grad is forward under a name of its own, which has no autograd formula: one would slow every call.
  const Operator operators[] = {{"forward", forward_signature, TORCH_BOX(&forward)},
                                {"forward_no_grad", forward_signature, TORCH_BOX(&forward)},
                                {"backward", backward_signature, TORCH_BOX(&backward)}};
  // The library handles stay open: closing one would take its registrations back.
  TorchLibraryHandle library = nullptr;
  if (aoti_torch_library_init_def("gnaforge", "gnaforge/core.cpp", 0, &library) != 0)
    return fail(error, n, "torch refused the namespace 'gnaforge'; is another copy of it registered?");
  for (const Operator& op : operators)
    if (aoti_torch_library_def(library, (std::string(op.name) + op.signature).c_str()) != 0)
      return fail(error, n, std::string("torch refused the schema of gnaforge::") + op.name);
  for (const char* device : {"CPU", "CUDA"}) {
    TorchLibraryHandle implementation = nullptr;
    if (aoti_torch_library_init_impl("gnaforge", device, "gnaforge/core.cpp", 0, &implementation) != 0)
      return fail(error, n, std::string("torch refused implementations for ") + device);
    for (const Operator& op : operators)
      if (torch_library_impl(implementation, op.name, op.kernel, TORCH_ABI_VERSION) != 0)
        return fail(error, n, std::string("torch refused the implementation of gnaforge::") + op.name);
  }
  return 0;
}

/// Loads a kernel library and stores the number of new kernels. 0 on success; else the reason is in error[0..n).
GNAFORGE_EXPORT int gnaforge_core_load(const char* path, int* added, char* error, size_t n) {
  try {
    *added = gnaforge::Call::table().load(path);
    return 0;
  } catch (const std::exception& reason) {
    return gnaforge::fail(error, n, reason.what());
  }
}

/// The ErrorCode of an operator's error on this thread, of which a caller has the text; 0 if it isn't the last that the
/// core raised here. Stores which bytes of the text say what is wrong: not whose error it is, nor how to register a
/// kernel.
GNAFORGE_EXPORT int gnaforge_core_error(const char* text, size_t* begin, size_t* end) {
  const gnaforge::LastError& error = gnaforge::last_error();
  *begin = error.begin;
  *end = error.end;
  return error.text == text ? static_cast<int>(error.code) : 0;
}

/// A tensor of a call that is only looked at.
struct gnaforge_given {
  const int64_t* sizes;
  int64_t dims;
  const char *dtype, *device;  ///< As torch names them: `float32`, `cuda:0`.
};

/// The words that a forward call with these tensors (query, key, value, and perhaps null: extra_k, extra_v,
/// extra_lengths) would be refused with, null if it wouldn't: what keeps the rules, and with `choose` is served by a
/// kernel that is loaded, however its tensors lie. They stay good until the next call on this thread.
GNAFORGE_EXPORT const char* gnaforge_core_check(const gnaforge_given* const tensors[6], const int64_t* pattern,
                                                size_t count, const double* scale, const char* key, int choose) {
  using namespace gnaforge;
  thread_local std::string words;
  const auto look = [&tensors](int i, const char* name) {
    uint32_t device = 0;
    int32_t index = 0;
    TORCH_ERROR_CODE_CHECK(torch_parse_device_string(tensors[i]->device, &device, &index));
    return Given{
        name, tensors[i]->sizes, tensors[i]->dims, type_named(tensors[i]->dtype), static_cast<DeviceType>(device),
        index};
  };
  try {
    GivenForward all{look(0, "query"), look(1, "key"), look(2, "value"), {}, {}, {}};
    if (tensors[3] != nullptr) all.extra_k = look(3, "extra_k");
    if (tensors[4] != nullptr) all.extra_v = look(4, "extra_v");
    if (tensors[5] != nullptr) all.extra_lengths = look(5, "extra_lengths");
    check_forward(all, pattern, count, scale ? std::optional(*scale) : std::nullopt, key, choose != 0);
    return nullptr;
  } catch (const std::exception& error) {
    words = error.what();
    return words.c_str();
  }
}

/// Grows with every change of the table.
GNAFORGE_EXPORT uint64_t gnaforge_core_generation() { return gnaforge::Call::table().generation(); }

/// Writes the table as a JSON array, sorted by key; returns the bytes it takes, the final 0 included.
GNAFORGE_EXPORT size_t gnaforge_core_kernels(char* json, size_t n) {
  std::string text = "[";
  for (const auto& [key, kernel] : *gnaforge::Call::table().kernels()) {
    const gnaforge_entry& entry = *kernel.entry;
    text += (text.size() > 1 ? "," : "") + std::string("{\"key\":") + gnaforge::json_string(key) +
            ",\"origin\":" + gnaforge::json_string(kernel.origin) + ",\"threads\":" + std::to_string(entry.threads) +
            ",\"shared_memory\":" + std::to_string(entry.shared_memory) +
            ",\"device\":" + (kernel.tensor_device() == GNAFORGE_CPU ? "\"cpu\"" : "\"cuda\"") +
            ",\"emulated\":" + (kernel.emulated ? "true" : "false") + ",\"features\":[";
    bool first = true;
    for (int feature = 0; feature < gnaforge::feature_count; ++feature) {
      if (!(entry.features >> feature & 1)) continue;
      text += (first ? "\"" : ",\"") + std::string(gnaforge::feature_names[feature]) + "\"";
      first = false;
    }
    text += "]}";
  }
  text += "]";
  if (text.size() < n) std::memcpy(json, text.c_str(), text.size() + 1);
  return text.size() + 1;
}
