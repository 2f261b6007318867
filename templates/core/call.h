// A call of an operator in the contract's form: tensors of torch by role, the kernel that is chosen, its run.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "choose.h"
#include "given.h"

// Lives in libtorch_cuda; weak, so that the core loads on a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace gnaforge {

/// An uninitialised contiguous tensor on the device of `like`. The direct shim takes a third of the time of the
/// dispatcher's route through stable::new_empty.
inline Tensor empty(const Tensor& like, const std::vector<int64_t>& sizes, int32_t dtype) {
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

inline void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*),
                         void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

inline void* current_stream(int32_t device) {
  if (aoti_torch_get_current_cuda_stream == nullptr)
    raise(ErrorCode::other, "got CUDA tensors, but this torch offers no CUDA stream: its libtorch_cuda isn't loaded");
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

/// One call of an op. Tensors are the caller's, and outlive it.
class Call {
 public:
  /// `like`: a tensor on the device that all of them are on.
  Call(gnaforge_op op, const gnaforge_problem& problem, const Given& like) {
    const bool cuda = like.device == DeviceType::CUDA;
    host_.struct_size = sizeof(host_);
    host_.threads = cuda ? 1 : static_cast<int32_t>(torch::stable::get_num_threads());
    host_.parallel_for = cuda ? nullptr : parallel_for;
    args_.struct_size = sizeof(args_);
    args_.op = op;
    args_.device = cuda ? GNAFORGE_CUDA : GNAFORGE_CPU;
    args_.device_index = like.device_index;
    args_.features = features_of(problem);
    args_.flags = GNAFORGE_ARGS_CHECKED;
    args_.tensors = by_role_;
    args_.problem = &problem;
    args_.host = &host_;
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  void read(gnaforge_role role, const Tensor& tensor) { add(role, tensor, const_cast<void*>(tensor.const_data_ptr())); }
  void write(gnaforge_role role, const Tensor& tensor) { add(role, tensor, tensor.mutable_data_ptr()); }

  /// A tensor that isn't there, as torch would make it: contiguous.
  void assume(gnaforge_role role, uint32_t dtype) {
    const Sizes sizes = sizes_of(*args_.problem, role);
    gnaforge_tensor& view = view_of(role, dtype, nullptr);
    int64_t stride = sizes.channels;
    const auto next = [&stride](int64_t size) {
      const int64_t own = stride;
      if (__builtin_mul_overflow(stride, size > 0 ? size : 1, &stride)) stride = INT64_MAX;
      return own;
    };
    view.head_stride = next(sizes.heads);
    for (int d = args_.problem->rank; d-- > 0;) view.token_stride[d] = next(sizes.tokens[d]);
    view.batch_stride = next(sizes.batch);
  }

  /// The kernel that `run` would run. Raises an error if there is none.
  void choose_kernel(std::string_view key) const { choose(table(), key, args_); }

  /// Chooses a kernel, or takes the one named `key`, and runs it. `like`: a tensor on the call's device.
  void run(std::string_view key, const Tensor& like) const {
    const Choice choice = choose_memoised(table(), key, args_);
    std::optional<DeviceGuard> guard;
    void* stream = nullptr;
    if (args_.device == GNAFORGE_CUDA) {
      guard.emplace(args_.device_index);
      stream = current_stream(args_.device_index);
    }
    const Workspace workspace(like, choice.workspace_bytes);
    char error[1024] = "";
    const int code = choice.entry->run(&args_, workspace.data(), stream, error, sizeof(error));
    if (code != GNAFORGE_OK)
      raise(code == GNAFORGE_OUT_OF_MEMORY ? ErrorCode::out_of_memory : ErrorCode::failed,
            std::string("kernel ") + choice.entry->key + " failed: " + error);
  }

  /// Of a call that has nothing to compute: raises what `run` would of its rules.
  void check() const { require_valid(args_); }

  /// The process's kernels.
  static Table& table() {
    static Table* const instance = new Table;  // never destroyed: kernels may run while the process exits
    return *instance;
  }

 private:
  void add(gnaforge_role role, const Tensor& tensor, void* data) {
    const RoleFacts& facts = role_facts[role];
    const int token_dims = facts.tokens == Tokens::none ? 0 : facts.tokens == Tokens::extra ? 1 : args_.problem->rank;
    gnaforge_tensor& view = view_of(role, dtype_code(tensor.scalar_type()), data);
    const auto strides = tensor.strides();
    view.batch_stride = strides[0];
    for (int d = 0; d < token_dims; ++d) view.token_stride[d] = strides[static_cast<size_t>(d) + 1];
    if (facts.heads != Heads::none) view.head_stride = strides[static_cast<size_t>(token_dims) + 1];
  }

  gnaforge_tensor& view_of(gnaforge_role role, uint32_t dtype, void* data) {
    gnaforge_tensor& view = views_[role];
    view = {};
    view.struct_size = sizeof(view);
    view.dtype = dtype;
    view.data = data;
    by_role_[role] = &view;
    if (args_.roles <= static_cast<uint32_t>(role)) args_.roles = static_cast<uint32_t>(role) + 1;
    return view;
  }

  gnaforge_host host_{};
  gnaforge_args args_{};
  const gnaforge_tensor* by_role_[GNAFORGE_ROLES] = {};
  gnaforge_tensor views_[GNAFORGE_ROLES];  // those of by_role_ are set
};

}  // namespace gnaforge
