// A call of an operator in the contract's form: tensors of torch by role, the kernel that is chosen, its run.
#pragma once

#include <atomic>
#include <cstdio>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "calls.h"
#include "choose.h"
#include "given.h"

// Lives in libtorch_cuda; weak, so that the core loads on a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace gnaforge {

[[noreturn]] inline void raise_out_of_memory(const Tensor& like, int64_t bytes, const std::string& purpose) {
  char amount[64];
  std::snprintf(amount, sizeof(amount), "%lld bytes (%.1f GiB)", static_cast<long long>(bytes),
                static_cast<double>(bytes) / (1 << 30));
  raise_out_of_memory(like.is_cuda(), "torch can't allocate " + std::string(amount) + " for " + purpose);
}

/// An uninitialised contiguous tensor on the device of `like`; null if there is no memory for it. The direct shim takes
/// a third of the time of the dispatcher's route through stable::new_empty.
inline AtenTensorHandle try_empty(const Tensor& like, const std::vector<int64_t>& sizes, int32_t dtype) {
  int64_t strides[GNAFORGE_MAX_RANK + 3];
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= sizes[d] > 0 ? sizes[d] : 1) strides[d] = stride;
  int32_t device_type = 0;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const auto dims = static_cast<int64_t>(sizes.size());
  const AOTITorchError error =
      aoti_torch_empty_strided(dims, sizes.data(), strides, dtype, device_type, like.get_device_index(), &handle);
  return error == AOTI_TORCH_SUCCESS ? handle : nullptr;
}

/// An uninitialised result.
inline Tensor make_result(const Tensor& like, const std::vector<int64_t>& sizes, int32_t dtype, const char* name) {
  int64_t bytes = 4;  // at most
  for (const int64_t size : sizes)
    if (__builtin_mul_overflow(bytes, size, &bytes))
      raise(ErrorCode::bad_input, std::string(name) + " is too large: its sizes reach beyond 64 bits");
  const AtenTensorHandle handle = try_empty(like, sizes, dtype);
  if (handle == nullptr) raise_out_of_memory(like, bytes, name + (", " + sizes_text(sizes.data(), sizes.size())));
  return Tensor(handle);
}

/// A contiguous copy of `tensor`, which `name` names.
inline Tensor contiguous_copy(const Tensor& tensor, const char* name) {
  const std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  const AtenTensorHandle handle = try_empty(tensor, sizes, dtype);
  if (handle == nullptr)
    raise_out_of_memory(tensor, tensor.numel() * dtype_bytes(dtype_code(tensor.scalar_type())),
                        std::string("a contiguous copy of ") + name + ", " + sizes_text(sizes.data(), sizes.size()));
  Tensor copy(handle);
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copy.get(), tensor.get(), 0));
  return copy;
}

/// The integers of a one-dimensional tensor, which `name` names. The host waits for those of a GPU.
inline std::vector<int64_t> numbers_of(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  const bool wide = type == ScalarType::Long;
  if (tensor.dim() != 1 || (!wide && type != ScalarType::Int))
    refuse(name, " must be a vector of int32 or int64, got ", tensor.dim(), " dims of ", type_name(type));
  const int64_t count = tensor.size(0), stride = 1;
  Tensor here = tensor;
  if (!tensor.is_cpu() || (count > 1 && tensor.stride(0) != 1)) {
    AtenTensorHandle handle = nullptr;
    const int32_t dtype = wide ? aoti_torch_dtype_int64() : aoti_torch_dtype_int32();
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(1, &count, &stride, dtype, aoti_torch_device_type_cpu(), -1, &handle));
    here = Tensor(handle);
    TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(here.get(), tensor.get(), 0));
  }
  const auto read = [count](const auto* data) { return std::vector<int64_t>(data, data + count); };
  return wide ? read(static_cast<const int64_t*>(here.const_data_ptr()))
              : read(static_cast<const int32_t*>(here.const_data_ptr()));
}

/// Says that a tensor is copied, and why.
inline void note_copy(const std::string& why) {
  const std::string note = "gnaforge: " + why + ", so it is copied at every call; this is said once";
  aoti_torch_warn("forward", "gnaforge/core.cpp", 0, note.c_str());
}

/// Scratch memory of one call: torch's, so that its allocator orders reuse by stream. On the CPU a call is done when it
/// returns, so a thread keeps a small one for its next call.
class Workspace {
 public:
  Workspace(const Tensor& like, const gnaforge_entry& entry, int64_t bytes) {
    constexpr int64_t kept = 1 << 20;
    thread_local std::optional<Tensor> own;
    if (bytes <= 0) return;
    const bool small = like.is_cpu() && bytes <= kept;
    if (small && own) {
      tensor_ = own;
      return;
    }
    const int64_t size = (small ? kept : bytes) + alignment;
    const AtenTensorHandle handle = try_empty(like, {size}, aoti_torch_dtype_uint8());
    if (handle == nullptr) raise_out_of_memory(like, size, std::string("the workspace of ") + entry.key);
    tensor_ = Tensor(handle);
    if (small) own = tensor_;
  }

  void* data() const {
    if (!tensor_) return nullptr;
    const auto address = reinterpret_cast<uintptr_t>(tensor_->mutable_data_ptr());
    return reinterpret_cast<void*>((address + alignment - 1) / alignment * alignment);
  }

 private:
  static constexpr int64_t alignment = 256;  // that the contract promises; of torch's memory on CPUs it is 64
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

  void read(gnaforge_role role, const Tensor& tensor) {
    like_ = inputs_[role] = &tensor;
    add(role, tensor, const_cast<void*>(tensor.const_data_ptr()));
  }

  /// The call needs what the problem doesn't say.
  void need(uint64_t features) { args_.features |= features; }

  /// A result is added to what its tensor holds.
  void accumulate(gnaforge_role role) {
    args_.accumulate |= bit(role);
    need(GNAFORGE_FEATURE_ACCUMULATE);
  }

  uint32_t dtype_of(gnaforge_role role) const { return by_role_[role]->dtype; }

  /// A new tensor for a result of the call. Raises what `check` would before it says that there is no memory.
  Tensor write(gnaforge_role role, const std::vector<int64_t>& sizes, int32_t dtype, uint32_t code) {
    int64_t bytes = dtype_bytes(code);
    bool fits = true;
    for (const int64_t size : sizes) fits = fits && !__builtin_mul_overflow(bytes, size, &bytes);
    if (!fits)
      raise(ErrorCode::bad_input, std::string(role_facts[role].name) + " is too large: its sizes reach beyond 64 bits");
    const AtenTensorHandle handle = try_empty(*like_, sizes, dtype);
    gnaforge_tensor& view = place(role);
    view = contiguous_view(*args_.problem, role, code);
    if (handle == nullptr) {
      check();
      raise_out_of_memory(
          *like_, bytes,
          role_facts[role].name + (", " + sizes_text(sizes.data(), sizes.size())) + " in " + dtype_name(code));
    }
    Tensor tensor(handle);
    view.data = tensor.mutable_data_ptr();
    return tensor;
  }

  /// A result that is somebody else's tensor, of the sizes and type that the call gives it.
  void write_into(gnaforge_role role, const Tensor& tensor) { add(role, tensor, tensor.mutable_data_ptr()); }

  /// Says that the call has nothing to do with what the one that is launched before it writes.
  void run_beside_last() { args_.flags |= GNAFORGE_ARGS_BESIDE; }

  /// A tensor that isn't there, as torch would make it: contiguous.
  void assume(gnaforge_role role, uint32_t dtype) { place(role) = contiguous_view(*args_.problem, role, dtype); }

  /// The kernel that `run` would run. Raises an error if there is none.
  void choose_kernel(std::string_view key) const { choose(table(), key, args_); }

  /// Chooses a kernel, or takes the one named `key`, and runs it.
  void run(std::string_view key) {
    prepare(key);
    launch();
  }

  /// All of `run` that comes before the launch. Kernels that run side by side have their workspaces at once.
  void prepare(std::string_view key) {
    choice_ = choose_memoised(table(), key, args_);
    if (choice_.copies != 0)
      copy_inputs(choice_.copies, [&](char* why, size_t n) { choice_.entry->can_run(&args_, why, n); });
    workspace_.emplace(*like_, *choice_.entry, choice_.workspace_bytes);
  }

  /// As `prepare`, for a run in slices. They are made of `numbers`, beside the call, in a way that `kind` names.
  template <class MakeSlices>
  void prepare_slices(std::string_view key, char kind, const std::vector<int64_t>& numbers,
                      const MakeSlices& make_slices) {
    plan_ = plan_memoised(table(), key, args_, kind, numbers, make_slices);
    const ListChoice& choice = plan_->choice;
    if (!choice.entry) return;  // there is nothing to compute
    if (choice.copies != 0)
      copy_inputs(choice.copies, [&](char* why, size_t n) {
        const CallList as_they_lie(args_, make_slices());
        const CallSpan list = as_they_lie.calls();
        for (int64_t i = 0; i < list.count && choice.entry->can_run(list.calls[i], why, n) == GNAFORGE_OK;) ++i;
      });
    choice_.entry = choice.entry;
    workspace_.emplace(*like_, *choice.entry, choice.workspace_bytes);
  }

  void launch() {
    if (choice_.entry == nullptr) return;
    std::optional<DeviceGuard> guard;
    void* stream = nullptr;
    if (args_.device == GNAFORGE_CUDA) {
      guard.emplace(args_.device_index);
      stream = current_stream(args_.device_index);
    }
    char error[1024] = "";
    if (plan_) plan_->list->place(args_);
    const int code = plan_ ? run_list(*plan_, workspace_->data(), stream, error, sizeof(error))
                           : choice_.entry->run(&args_, workspace_->data(), stream, error, sizeof(error));
    if (code == GNAFORGE_OUT_OF_MEMORY)
      gnaforge::raise_out_of_memory(like_->is_cuda(), std::string("kernel ") + choice_.entry->key + ": " + error);
    if (code != GNAFORGE_OK)
      raise(ErrorCode::failed, std::string("kernel ") + choice_.entry->key + " failed: " + error);
  }

  /// Of a call that has nothing to compute: raises what `run` would of its rules.
  void check() const { require_valid(args_); }

  /// `check`, and with `choose` also `choose_kernel`, of slices.
  void check_slices(const Slices& slices, std::string_view key, bool choose) const {
    if (choose)
      plan(table(), key, args_, slices);
    else
      CallList(args_, slices).require_valid();
  }

  /// The process's kernels.
  static Table& table() {
    static Table* const instance = new Table;  // never destroyed: kernels may run while the process exits
    return *instance;
  }

 private:
  /// The view of a role, which is now one of the call's.
  gnaforge_tensor& place(gnaforge_role role) {
    by_role_[role] = &views_[role];
    if (args_.roles <= static_cast<uint32_t>(role)) args_.roles = static_cast<uint32_t>(role) + 1;
    return views_[role];
  }

  void add(gnaforge_role role, const Tensor& tensor, void* data) {
    const int tokens = token_dims(*args_.problem, role);
    gnaforge_tensor& view = place(role);
    view = {};
    view.struct_size = sizeof(view);
    view.dtype = dtype_code(tensor.scalar_type());
    view.data = data;
    const auto strides = tensor.strides();
    view.batch_stride = strides[0];
    for (int d = 0; d < tokens; ++d) view.token_stride[d] = strides[static_cast<size_t>(d) + 1];
    if (role_facts[role].heads != Heads::none) view.head_stride = strides[static_cast<size_t>(tokens) + 1];
  }

  /// Puts copies in the place of inputs that the kernel can't read as they lie; `say_why` writes why not.
  template <class SayWhy>
  [[gnu::noinline]] void copy_inputs(uint64_t roles, const SayWhy& say_why) {
    if (!copies_noted().exchange(true)) {
      char why[512] = "";
      say_why(why, sizeof(why));
      note_copy(why);
    }
    for (int role = 0; role < GNAFORGE_ROLES; ++role) {
      if (!(roles & bit(role))) continue;
      copies_.push_back(contiguous_copy(*inputs_[role], role_facts[role].name));
      add(static_cast<gnaforge_role>(role), copies_.back(), const_cast<void*>(copies_.back().const_data_ptr()));
    }
  }

  static std::atomic<bool>& copies_noted() {
    static std::atomic<bool> noted{false};
    return noted;
  }

  const Tensor* like_ = nullptr;  // an input
  gnaforge_host host_{};
  gnaforge_args args_{};
  const gnaforge_tensor* by_role_[GNAFORGE_ROLES] = {};
  gnaforge_tensor views_[GNAFORGE_ROLES];  // those of by_role_ are set
  const Tensor* inputs_[GNAFORGE_ROLES];   // those that are read are set
  std::vector<Tensor> copies_;
  Choice choice_{};
  std::shared_ptr<Plan> plan_;  // of a call in slices
  std::optional<Workspace> workspace_;
};

}  // namespace gnaforge
