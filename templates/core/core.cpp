// The core extension: registers gnaforge's operators with torch and runs kernels from the table.
//
// Built on the libtorch stable ABI (TORCH_TARGET_VERSION 2.10), so one binary serves every later torch and Python.
// There is no static registration: a second one for the same namespace would end the process, so gnaforge_core_init
// registers and checks every return code, and Python calls it once per process.
#include <cmath>
#include <optional>
#include <sstream>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "table.h"

#define GNAFORGE_EXPORT extern "C" __attribute__((visibility("default")))

// Lives in libtorch_cuda; weak, so that the core loads on a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace gnaforge {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr const char* forward_signature =
    "(Tensor q, Tensor k, Tensor v, int[] pattern, float? scale=None, str key=\"\", Tensor? descale_q=None, "
    "Tensor? descale_k=None, Tensor? descale_v=None) -> (Tensor, Tensor)";
constexpr const char* backward_signature =
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int[] pattern, "
    "float? scale=None, str key=\"\") -> (Tensor, Tensor, Tensor)";

using BoxedKernel = void (*)(StableIValue*, uint64_t, uint64_t);
struct Operator {
  const char* name;
  const char* signature;
  BoxedKernel kernel;
};

Table& table() {
  static Table* const instance = new Table;  // never destroyed: kernels may run while the process exits
  return *instance;
}

/// Thrown text reaches Python as it is. "bad input" becomes a ValueError there.
template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  text << "gnaforge: ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t d = 0; d < tensor.dim(); ++d) text += (d ? ", " : "") + std::to_string(tensor.size(d));
  return text + "]";
}

uint32_t dtype_code(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return GNAFORGE_FP32;
    case ScalarType::BFloat16: return GNAFORGE_BF16;
    case ScalarType::Half: return GNAFORGE_FP16;
    default: return 0;
  }
}

/// Kernels need contiguous channels and strides >= 0, which torch guarantees; anything else is copied.
Tensor with_contiguous_channels(const Tensor& tensor, const char* name) {
  const int64_t last = tensor.dim() - 1;
  if (tensor.size(last) == 1 || tensor.stride(last) == 1) return tensor;
  static std::atomic<bool> noted{false};
  if (!noted.exchange(true)) {
    const std::string note = std::string("gnaforge: the last dimension of ") + name +
                             " is not contiguous, so it is copied at every call; this is said once";
    aoti_torch_warn("forward", "gnaforge/core.cpp", 0, note.c_str());
  }
  return torch::stable::contiguous(tensor);
}

gnaforge_tensor view(const Tensor& tensor, int rank, bool writable) {
  gnaforge_tensor result{};
  result.struct_size = sizeof(result);
  result.dtype = dtype_code(tensor.scalar_type());
  result.data = writable ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
  const auto strides = tensor.strides();
  result.batch_stride = strides[0];
  for (int d = 0; d < rank; ++d) result.token_stride[d] = strides[static_cast<size_t>(d) + 1];
  result.head_stride = strides[static_cast<size_t>(rank) + 1];
  return result;
}

void check_tensor(const Tensor& t, const char* name, const Tensor& q, int rank) {
  if (t.dim() != rank + 3)
    refuse("bad input: ", name, " must be [batch, ", rank, " token dims, heads, head_dim], got shape ", shape_text(t));
  if (dtype_code(t.scalar_type()) == 0) refuse("bad input: ", name, " must be float32, bfloat16 or float16");
  if (t.scalar_type() != q.scalar_type()) refuse("bad input: query, key and value must have one dtype");
  if (t.is_cpu() != q.is_cpu() || t.get_device_index() != q.get_device_index())
    refuse("bad input: query, key and value must be on one device");
  for (int64_t d = 0; d <= rank; ++d)
    if (t.size(d) != q.size(d))
      refuse("bad input: ", name, " has shape ", shape_text(t), ", query has ", shape_text(q),
             "; batch and token dims must agree");
}

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<int64_t>& pattern) {
  if (pattern.empty() || pattern.size() % 4 != 0 || pattern.size() > 4 * GNAFORGE_MAX_RANK)
    refuse("bad input: pattern must hold window, stride, dilation and causal of 1 to 3 dimensions, got ",
           pattern.size(), " numbers");
  const int rank = static_cast<int>(pattern.size() / 4);
  check_tensor(q, "query", q, rank);
  check_tensor(k, "key", q, rank);
  check_tensor(v, "value", q, rank);
  const int64_t heads = q.size(rank + 1);
  const int64_t kv_heads = k.size(rank + 1);
  if (k.size(rank + 2) != q.size(rank + 2))
    refuse("bad input: key has head_dim ", k.size(rank + 2), ", query has ", q.size(rank + 2));
  if (kv_heads != v.size(rank + 1))
    refuse("bad input: key has ", kv_heads, " heads, value has ", v.size(rank + 1));
  if (kv_heads == 0 ? heads != 0 : heads % kv_heads != 0)
    refuse("bad input: ", heads, " query heads can't be shared among ", kv_heads,
           " key/value heads; it must divide evenly");
}

/// The constraints of GNA itself, which no kernel can lift.
void check_pattern(const gnaforge_problem& p) {
  for (int d = 0; d < p.rank; ++d) {
    const int64_t window = p.window[d], stride = p.stride[d], dilation = p.dilation[d];
    if (window < 1) refuse("bad input: kernel_size is ", window, " along dim ", d, "; it must be at least 1");
    if (stride < 1 || stride > window)
      refuse("bad input: stride is ", stride, " along dim ", d, "; it must be 1 to kernel_size (", window, ")");
    if (dilation < 1) refuse("bad input: dilation is ", dilation, " along dim ", d, "; it must be at least 1");
    if (window > p.tokens[d] / dilation)
      refuse("bad input: kernel_size ", window, " times dilation ", dilation, " exceeds the ", p.tokens[d],
             " tokens along dim ", d);
  }
}

gnaforge_problem make_problem(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<int64_t>& pattern,
                              std::optional<double> scale) {
  gnaforge_problem p{};
  const int rank = static_cast<int>(pattern.size() / 4);
  p.struct_size = sizeof(p);
  p.rank = rank;
  p.batch = q.size(0);
  for (int d = 0; d < rank; ++d) {
    const auto at = [&](int group) { return pattern[static_cast<size_t>(group * rank + d)]; };
    p.tokens[d] = q.size(d + 1);
    p.window[d] = at(0);
    p.stride[d] = at(1);
    p.dilation[d] = at(2);
    p.causal[d] = at(3);
  }
  p.heads = q.size(rank + 1);
  p.kv_heads = k.size(rank + 1);
  p.head_dim = q.size(rank + 2);
  p.value_head_dim = v.size(rank + 2);
  p.scale = scale ? *scale : 1.0 / std::sqrt(static_cast<double>(p.head_dim));
  return p;
}

/// An uninitialised contiguous tensor on the device of `like`. The direct shim takes a third of the time of the
/// dispatcher's route through stable::new_empty.
Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, int32_t dtype) {
  int64_t strides[GNAFORGE_MAX_RANK + 3];
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= sizes[d] > 0 ? sizes[d] : 1) strides[d] = stride;
  int32_t device_type = 0;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides, dtype,
                                                  device_type, like.get_device_index(), &handle));
  return Tensor(handle);
}

/// Scratch memory of one call: torch's, so that its allocator orders reuse by stream. On the CPU a call is done when it
/// returns, so a thread keeps a small one for its next call.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t bytes) {
    constexpr int64_t kept = 1 << 20;
    thread_local std::optional<Tensor> own;
    if (bytes <= 0) return;
    if (!like.is_cpu() || bytes > kept) {
      tensor_ = empty(like, {bytes}, aoti_torch_dtype_uint8());
    } else {
      if (!own) own = empty(like, {kept}, aoti_torch_dtype_uint8());
      tensor_ = own;
    }
  }

  void* data() const { return tensor_ ? tensor_->mutable_data_ptr() : nullptr; }

 private:
  std::optional<Tensor> tensor_;
};

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

void* current_stream(int32_t device) {
  if (aoti_torch_get_current_cuda_stream == nullptr)
    refuse("got CUDA tensors, but this torch offers no CUDA stream: its libtorch_cuda isn't loaded");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

/// Makes the tensors' device current while a kernel is launched.
class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t device) { TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(device, &guard_)); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() { aoti_torch_delete_device_guard(guard_); }

 private:
  DeviceGuardHandle guard_ = nullptr;
};

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, std::vector<int64_t> pattern,
                                   std::optional<double> scale, std::string key, std::optional<Tensor> descale_q,
                                   std::optional<Tensor> descale_k, std::optional<Tensor> descale_v) {
  check_inputs(q, k, v, pattern);
  if (descale_q || descale_k || descale_v)
    refuse("bad input: descale_q, descale_k and descale_v belong to fp8, which this version doesn't have");
  const gnaforge_problem problem = make_problem(q, k, v, pattern, scale);
  q = with_contiguous_channels(q, "query");
  k = with_contiguous_channels(k, "key");
  v = with_contiguous_channels(v, "value");

  std::vector<int64_t> shape(q.sizes().begin(), q.sizes().end() - 1);
  Tensor lse = empty(q, shape, aoti_torch_dtype_float32());
  shape.push_back(problem.value_head_dim);
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(q.get(), &dtype));
  Tensor out = empty(q, shape, dtype);
  if (out.numel() == 0 && lse.numel() == 0) return {out, lse};
  check_pattern(problem);

  const gnaforge_tensor q_view = view(q, problem.rank, false);
  const gnaforge_tensor k_view = view(k, problem.rank, false);
  const gnaforge_tensor v_view = view(v, problem.rank, false);
  gnaforge_tensor out_view = view(out, problem.rank, true);
  gnaforge_tensor lse_view = view(lse, problem.rank, true);
  const bool cuda = q.is_cuda();
  gnaforge_host host{};
  host.struct_size = sizeof(host);
  if (!cuda) {
    host.threads = static_cast<int32_t>(torch::stable::get_num_threads());
    host.parallel_for = parallel_for;
  }
  gnaforge_args args{};
  args.struct_size = sizeof(args);
  args.device = cuda ? GNAFORGE_CUDA : GNAFORGE_CPU;
  args.device_index = q.get_device_index();
  args.problem = &problem;
  args.q = &q_view;
  args.k = &k_view;
  args.v = &v_view;
  args.out = &out_view;
  args.log_sum_exp = &lse_view;
  args.host = &host;

  const Choice choice = choose_memoised(table(), key, args);
  std::optional<DeviceGuard> guard;
  void* stream = nullptr;
  if (cuda) {
    guard.emplace(args.device_index);
    stream = current_stream(args.device_index);
  }
  const Workspace workspace(q, choice.workspace_bytes);
  char error[1024] = "";
  const int status = choice.entry->run(&args, workspace.data(), stream, error, sizeof(error));
  if (status != 0) refuse("kernel ", choice.entry->key, " failed: ", error);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor, std::optional<Tensor>, Tensor, Tensor, Tensor, Tensor, Tensor,
                                            std::vector<int64_t>, std::optional<double>, std::string) {
  refuse("this version has no backward kernels: gradients don't flow through neighborhood attention yet. For inference "
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
    *added = gnaforge::table().load(path);
    return 0;
  } catch (const std::exception& reason) {
    return gnaforge::fail(error, n, reason.what());
  }
}

/// Grows with every change of the table.
GNAFORGE_EXPORT uint64_t gnaforge_core_generation() { return gnaforge::table().generation(); }

/// Writes the table as a JSON array, sorted by key; returns the bytes it takes, the final 0 included.
GNAFORGE_EXPORT size_t gnaforge_core_kernels(char* json, size_t n) {
  std::string text = "[";
  for (const auto& [key, kernel] : *gnaforge::table().kernels()) {
    const gnaforge_entry& entry = *kernel.entry;
    text += (text.size() > 1 ? "," : "") + std::string("{\"key\":") + gnaforge::json_string(key) + ",\"origin\":" +
            gnaforge::json_string(kernel.origin) + ",\"threads\":" + std::to_string(entry.threads) +
            ",\"shared_memory\":" + std::to_string(entry.shared_memory) + ",\"device\":" +
            (kernel.tensor_device() == GNAFORGE_CPU ? "\"cpu\"" : "\"cuda\"") +
            ",\"emulated\":" + (kernel.emulated ? "true" : "false") + "}";
  }
  text += "]";
  if (text.size() < n) std::memcpy(json, text.c_str(), text.size() + 1);
  return text.size() + 1;
}
