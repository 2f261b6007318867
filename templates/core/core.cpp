// The core extension: registers gnaforge's operators with torch and runs kernels from the table.
//
// Built on the libtorch stable ABI (TORCH_TARGET_VERSION 2.10), so one binary serves every later torch and Python.
// There is no static registration: a second one for the same namespace would end the process, so gnaforge_core_init
// registers and checks every return code, and Python calls it once per process.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <optional>
#include <sstream>
#include <tuple>

#include <torch/csrc/stable/library.h>

#include "call.h"

#define GNAFORGE_EXPORT extern "C" __attribute__((visibility("default")))

namespace gnaforge {
namespace {

constexpr const char* forward_signature =
    "(Tensor q, Tensor k, Tensor v, int[] pattern, float? scale=None, str key=\"\", Tensor? extra_k=None, "
    "Tensor? extra_v=None, Tensor? extra_lengths=None) -> (Tensor, Tensor)";
constexpr const char* backward_signature =
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int[] pattern, "
    "float? scale=None, str key=\"\") -> (Tensor, Tensor, Tensor)";

using BoxedKernel = void (*)(StableIValue*, uint64_t, uint64_t);
struct Operator {
  const char* name;
  const char* signature;
  BoxedKernel kernel;
};

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  raise(ErrorCode::bad_input, text.str());
}

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

std::string shape_text(const Tensor& tensor) { return sizes_text({tensor.sizes().begin(), tensor.sizes().end()}); }

/// Kernels need contiguous channels and strides >= 0, which torch guarantees; anything else is copied.
Tensor with_contiguous_channels(const Tensor& tensor, const char* name) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) == 1 || tensor.stride(last) == 1) return tensor;
  static std::atomic<bool> noted{false};
  if (!noted.exchange(true)) note_copy(std::string("the last dimension of ") + name + " is not contiguous");
  return contiguous_copy(tensor, name);
}

void check_kind(const Tensor& t, const char* name, const Tensor& q) {
  if (t.scalar_type() != q.scalar_type()) refuse("query, key and value must have one dtype, ", name, " has another");
  if (t.is_cpu() != q.is_cpu() || t.get_device_index() != q.get_device_index())
    refuse("query, key and value must be on one device, ", name, " is on another");
}

/// The numbers of each dim that `pattern` holds: the fields of gnaforge_problem from window to causal, and perhaps
/// those from edge to kv_sink, whose kv_tokens are the key tensor's. No other count is possible: it would be ambiguous
/// which rank a list is of.
constexpr size_t plain_groups = 4, all_groups = 10;

/// Puts the tensors' shapes and the pattern into the contract's form.
gnaforge_problem gather(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<int64_t>& pattern,
                        std::optional<double> scale) {
  size_t rank = 1;
  while (rank < GNAFORGE_MAX_RANK && pattern.size() != rank * plain_groups && pattern.size() != rank * all_groups)
    ++rank;
  const bool plain = pattern.size() == rank * plain_groups;
  if (!plain && pattern.size() != rank * all_groups)
    refuse(
        "pattern must hold window, stride, dilation and causal of 1 to 3 dimensions, perhaps also edge, sink, grid, "
        "q_offset, kv_offset and kv_sink; got ",
        pattern.size(), " numbers");
  const auto q_sizes = q.sizes(), k_sizes = k.sizes(), v_sizes = v.sizes();
  // Only a pattern with a grid may have keys of another extent; the values' is always the keys'.
  const auto& key_like = plain ? q_sizes : k_sizes;
  const auto check = [&](const Tensor& tensor, const char* name, const auto& sizes, const auto& like) {
    if (sizes.size() != rank + 3)
      refuse(name, " must be [batch, ", rank, " token dims, heads, head_dim], got shape ", shape_text(tensor));
    if (const uint32_t dtype = dtype_code(tensor.scalar_type()); dtype == 0 || dtype == GNAFORGE_INT32)
      refuse(name, " must be float32, bfloat16 or float16");
    check_kind(tensor, name, q);
    bool agree = sizes[0] == q_sizes[0];
    for (size_t d = 1; d <= rank; ++d) agree = agree && sizes[d] == like[d];
    if (!agree)
      refuse(name, " has shape ", shape_text(tensor), ", ", plain ? "query" : "key", " has ", shape_text(plain ? q : k),
             "; batch and token dims must agree");
  };
  check(q, "query", q_sizes, q_sizes);
  check(k, "key", k_sizes, key_like);
  check(v, "value", v_sizes, key_like);
  gnaforge_problem p{};
  p.struct_size = sizeof(p);
  p.rank = static_cast<int>(rank);
  p.batch = q_sizes[0];
  p.heads = q_sizes[rank + 1];
  p.kv_heads = k_sizes[rank + 1];
  p.head_dim = q_sizes[rank + 2];
  p.value_head_dim = v_sizes[rank + 2];
  p.scale = scale ? *scale : 1.0 / std::sqrt(static_cast<double>(p.head_dim));
  if (k_sizes[rank + 2] != p.head_dim) refuse("key has head_dim ", k_sizes[rank + 2], ", query has ", p.head_dim);
  if (v_sizes[rank + 1] != p.kv_heads) refuse("key has ", p.kv_heads, " heads, value has ", v_sizes[rank + 1]);
  const int64_t* next = pattern.data();
  const auto take = [&next, rank](int64_t* field) {
    for (size_t d = 0; d < rank; ++d) field[d] = *next++;
  };
  for (int64_t* field : {p.window, p.stride, p.dilation, p.causal}) take(field);
  for (size_t d = 0; d < rank; ++d) {
    p.tokens[d] = q_sizes[d + 1];
    p.grid[d] = p.kv_tokens[d] = k_sizes[d + 1];
  }
  if (!plain)
    for (int64_t* field : {p.edge, p.sink, p.grid, p.q_offset, p.kv_offset, p.kv_sink}) take(field);
  return p;
}

void check_shape(const Tensor& t, const char* name, const std::vector<int64_t>& wanted) {
  bool same = t.dim() == static_cast<int64_t>(wanted.size());
  for (size_t d = 0; same && d < wanted.size(); ++d) same = t.size(static_cast<int64_t>(d)) == wanted[d];
  if (!same) refuse(name, " has shape ", shape_text(t), ", which doesn't fit query, key and value");
}

/// A piece of extra keys, all or nothing of it: [batch, tokens, heads, channels], lengths [batch]. Returns its tokens.
int64_t gather_extra(const std::optional<Tensor>& k, const std::optional<Tensor>& v,
                     const std::optional<Tensor>& lengths, const Tensor& q, const gnaforge_problem& p) {
  if (!k && !v && !lengths) return 0;
  if (!k || !v) refuse("extra_k and extra_v come together");
  const int64_t tokens = k->dim() == 4 ? k->size(1) : -1;
  check_shape(*k, "extra_k", {p.batch, tokens, p.kv_heads, p.head_dim});
  check_shape(*v, "extra_v", {p.batch, tokens, p.kv_heads, p.value_head_dim});
  check_kind(*k, "extra_k", q);
  check_kind(*v, "extra_v", q);
  if (lengths) {
    check_shape(*lengths, "extra_lengths", {p.batch});
    if (dtype_code(lengths->scalar_type()) != GNAFORGE_INT32 || lengths->get_device_index() != q.get_device_index() ||
        lengths->is_cpu() != q.is_cpu())
      refuse("extra_lengths must be int32 and on the device of the query");
  }
  return tokens;
}

bool is_one_head(const Tensor& tensor, const gnaforge_problem& p) { return tensor.stride(p.rank + 1) == 0; }

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const std::vector<int64_t>& pattern, std::optional<double> scale,
                                   StringHandle pinned_key, const std::optional<Tensor>& extra_k,
                                   const std::optional<Tensor>& extra_v, const std::optional<Tensor>& extra_lengths) {
  const Text pinned(pinned_key);
  gnaforge_problem problem = gather(query, key, value, pattern, scale);
  const int64_t extra = problem.extra_tokens[0] = gather_extra(extra_k, extra_v, extra_lengths, query, problem);
  // Heads of keys and values that are one, as `expand` makes them, are passed as one: no kernel need read them apart.
  if (extra == 0 && problem.kv_heads > 1 && problem.heads % problem.kv_heads == 0 && is_one_head(key, problem) &&
      is_one_head(value, problem))
    problem.kv_heads = 1;
  const Tensor q = with_contiguous_channels(query, "query");
  const Tensor k = with_contiguous_channels(key, "key");
  const Tensor v = with_contiguous_channels(value, "value");
  std::vector<Tensor> more;
  if (extra > 0) more = {with_contiguous_channels(*extra_k, "extra_k"), with_contiguous_channels(*extra_v, "extra_v")};

  Call call(GNAFORGE_GNA_FORWARD, problem, q);
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

std::tuple<Tensor, Tensor, Tensor> backward(Tensor, std::optional<Tensor>, Tensor, Tensor, Tensor, Tensor, Tensor,
                                            std::vector<int64_t>, std::optional<double>, StringHandle key) {
  const Text pinned(key);
  raise(ErrorCode::other,
        "this version has no backward kernels: gradients don't flow through neighborhood attention yet. For inference "
        "call it under torch.no_grad(); for training keep NATTEN or FlexAttention until they land");
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
  // forward_with_grad is forward under a name of its own: an autograd formula on `forward` would slow every call.
  const Operator operators[] = {{"forward", forward_signature, TORCH_BOX(&forward)},
                                {"forward_with_grad", forward_signature, TORCH_BOX(&forward)},
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
