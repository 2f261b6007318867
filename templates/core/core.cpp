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
#include "forward.h"
#include "joint.h"
#include "joint_backward.h"
#include "scaled.h"
#include "varlen.h"
#include "varlen_backward.h"

#define GNAFORGE_EXPORT extern "C" __attribute__((visibility("default")))
#ifndef GNAFORGE_NAMESPACE
#define GNAFORGE_NAMESPACE gnaforge  // an export brings a core with a namespace of its own
#endif
#define GNAFORGE_TEXT_OF(name) #name
#define GNAFORGE_TEXT(name) GNAFORGE_TEXT_OF(name)

namespace gnaforge {
namespace {

constexpr const char* own_namespace = GNAFORGE_TEXT(GNAFORGE_NAMESPACE);

constexpr const char* forward_signature =
    "(Tensor q, Tensor k, Tensor v, int[] pattern, float? scale=None, str key=\"\", Tensor? extra_k=None, "
    "Tensor? extra_v=None, Tensor? extra_lengths=None) -> (Tensor, Tensor)";
constexpr const char* forward_out_signature =
    "(Tensor q, Tensor k, Tensor v, int[] pattern, float? scale=None, str key=\"\", Tensor? extra_k=None, "
    "Tensor? extra_v=None, Tensor? extra_lengths=None, *, Tensor(a!) output, Tensor(b!) output_lse) -> ()";

using BoxedKernel = void (*)(StableIValue*, uint64_t, uint64_t);
struct Operator {
  const char* name;
  const char* signature;
  BoxedKernel kernel;
};

bool is_one_head(const Tensor& tensor, const gnaforge_problem& p) { return tensor.stride(p.rank + 1) == 0; }

/// The problem of a call. Heads of keys and values that are one, as `expand` makes them, are passed as one: no kernel
/// need read them apart.
gnaforge_problem problem_of(const ForwardTensors& tensors, const GivenForward& given,
                            const std::vector<int64_t>& pattern, std::optional<double> scale) {
  gnaforge_problem problem = gather_first(given, pattern, scale);
  if (problem.extra_tokens[0] == 0 && problem.kv_heads > 1 && problem.heads % problem.kv_heads == 0 &&
      is_one_head(tensors.k, problem) && is_one_head(tensors.v, problem))
    problem.kv_heads = 1;
  return problem;
}

std::tuple<Tensor, Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                                   const std::vector<int64_t>& pattern, std::optional<double> scale,
                                   StringHandle pinned_key, const std::optional<Tensor>& extra_k,
                                   const std::optional<Tensor>& extra_v, const std::optional<Tensor>& extra_lengths) {
  const Text pinned(pinned_key);
  const ForwardTensors tensors{
      query, key, value, {{pointer_to(extra_k), pointer_to(extra_v), pointer_to(extra_lengths)}, {}}};
  const GivenForward given = tensors.given();
  ForwardCall forward(tensors, given, problem_of(tensors, given, pattern, scale));
  forward.set_patterns(given, pattern, scale);
  auto results = forward.make_results(given.q);
  forward.run(pinned.view());
  return results;
}

/// As `forward`, with results in tensors of the caller's.
void forward_out(const Tensor& query, const Tensor& key, const Tensor& value, const std::vector<int64_t>& pattern,
                 std::optional<double> scale, StringHandle pinned_key, const std::optional<Tensor>& extra_k,
                 const std::optional<Tensor>& extra_v, const std::optional<Tensor>& extra_lengths, const Tensor& out,
                 const Tensor& lse) {
  const Text pinned(pinned_key);
  const ForwardTensors tensors{
      query, key, value, {{pointer_to(extra_k), pointer_to(extra_v), pointer_to(extra_lengths)}, {}}};
  const GivenForward given = tensors.given();
  ForwardCall forward(tensors, given, problem_of(tensors, given, pattern, scale));
  forward.set_patterns(given, pattern, scale);
  forward.take_results(given.q, {out, lse});
  forward.run(pinned.view());
}

void assume_tensors(Call& call, const GivenForward& tensors, const gnaforge_problem& problem, uint32_t out_dtype = 0) {
  const uint32_t dtype = dtype_code(tensors.q.dtype);
  for (const gnaforge_role role : {GNAFORGE_Q, GNAFORGE_K, GNAFORGE_V}) call.assume(role, dtype);
  call.assume(GNAFORGE_OUT, out_dtype == 0 ? dtype : out_dtype);
  call.assume(GNAFORGE_LSE, GNAFORGE_FP32);
  for (int i = 0; i < GNAFORGE_MAX_EXTRA; ++i) {
    if (problem.extra_tokens[i] == 0) continue;
    for (const int role : {GNAFORGE_EXTRA_K, GNAFORGE_EXTRA_V})
      call.assume(static_cast<gnaforge_role>(role + i), dtype);
    if (tensors.pieces[i].lengths) call.assume(static_cast<gnaforge_role>(GNAFORGE_EXTRA_LENGTHS + i), GNAFORGE_INT32);
  }
}

/// What a forward call without data would be refused for: raises it. With `choose` also that no kernel fits it.
gnaforge_problem check_forward(const GivenForward& tensors, const std::vector<int64_t>& pattern,
                               std::optional<double> scale, std::string_view pinned, bool choose, uint32_t out_dtype) {
  const gnaforge_problem problem = gather_first(tensors, pattern, scale);
  Call call(GNAFORGE_GNA_FORWARD, problem, tensors.q);
  assume_tensors(call, tensors, problem, out_dtype);
  choose = choose && !has_no_rows(problem);
  if (head_patterns(tensors.q, pattern.size()) > 1) {
    call.check_slices(slices_of_heads(tensors, problem, pattern.data(), pattern.size(), scale), pinned, choose);
    return problem;
  }
  call.check();
  if (choose) call.choose_kernel(pinned);
  return problem;
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
  const Operator operators[] = {
      {"forward", forward_signature, TORCH_BOX(&forward)},
      {"forward_no_grad", forward_signature, TORCH_BOX(&forward)},
      {"forward_out", forward_out_signature, TORCH_BOX(&forward_out)},
      {"forward_scaled_out", forward_scaled_out_signature, TORCH_BOX(&forward_scaled_out)},
      {"joint", joint_signature, TORCH_BOX(&joint)},
      {"joint_out", joint_out_signature, TORCH_BOX(&joint_out)},
      {"joint_apart", joint_apart_signature, TORCH_BOX(&joint_apart)},
      {"joint_apart_out", joint_apart_out_signature, TORCH_BOX(&joint_apart_out)},
      {"forward_varlen", forward_varlen_signature, TORCH_BOX(&forward_varlen)},
      {"forward_varlen_out", forward_varlen_out_signature, TORCH_BOX(&forward_varlen_out)},
      {"attention_varlen", attention_varlen_signature, TORCH_BOX(&attention_varlen)},
      {"attention_varlen_out", attention_varlen_out_signature, TORCH_BOX(&attention_varlen_out)},
      {"backward", backward_signature, TORCH_BOX(&backward)},
      {"joint_backward", joint_backward_signature, TORCH_BOX(&joint_backward)},
      {"backward_varlen", backward_varlen_signature, TORCH_BOX(&backward_varlen)},
      {"attention_backward_varlen", attention_backward_varlen_signature, TORCH_BOX(&attention_backward_varlen)}};
  // The library handles stay open: closing one would take its registrations back.
  TorchLibraryHandle library = nullptr;
  if (aoti_torch_library_init_def(own_namespace, "gnaforge/core.cpp", 0, &library) != 0)
    return fail(error, n,
                std::string("torch refused the namespace ") + own_namespace + "; is another copy of it registered?");
  for (const Operator& op : operators)
    if (aoti_torch_library_def(library, (std::string(op.name) + op.signature).c_str()) != 0)
      return fail(error, n, std::string("torch refused the schema of ") + own_namespace + "::" + op.name);
  for (const char* device : {"CPU", "CUDA"}) {
    TorchLibraryHandle implementation = nullptr;
    if (aoti_torch_library_init_impl(own_namespace, device, "gnaforge/core.cpp", 0, &implementation) != 0)
      return fail(error, n, std::string("torch refused implementations for ") + device);
    for (const Operator& op : operators)
      if (torch_library_impl(implementation, op.name, op.kernel, TORCH_ABI_VERSION) != 0)
        return fail(error, n, std::string("torch refused the implementation of ") + own_namespace + "::" + op.name);
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
  const char* name;
  const int64_t* sizes;  ///< Null: there is no such tensor.
  int64_t dims;
  const char *dtype, *device;  ///< As torch names them: `float32`, `cuda:0`.
  int64_t last_stride;         ///< Of results.
};

namespace gnaforge {
namespace {

Given look(const gnaforge_given& tensor) {
  uint32_t device = 0;
  int32_t index = 0;
  TORCH_ERROR_CODE_CHECK(torch_parse_device_string(tensor.device, &device, &index));
  return {tensor.name, tensor.sizes, tensor.dims, type_named(tensor.dtype), static_cast<DeviceType>(device), index};
}

GivenForward look_at_inputs(const gnaforge_given tensors[11]) {
  const auto look_if_there = [](const gnaforge_given& tensor) {
    return tensor.sizes == nullptr ? std::nullopt : std::optional(look(tensor));
  };
  const auto piece = [&](const gnaforge_given* first) {
    return GivenPiece{first[0].name,           first[1].name,           first[2].name,
                      look_if_there(first[0]), look_if_there(first[1]), look_if_there(first[2])};
  };
  return {look(tensors[0]), look(tensors[1]), look(tensors[2]), {piece(tensors + 3), piece(tensors + 6)}};
}

/// Refuses results of the caller's, if there are some, that can't hold those of the call.
void check_given_results(const gnaforge_given tensors[11], const Given& q, const gnaforge_problem& problem) {
  if (tensors[9].sizes == nullptr) return;
  check_results(look(tensors[9]), tensors[9].last_stride, look(tensors[10]), q, output_sizes(q, problem));
}

/// What `check` raises, or null. The words stay good until the next call on this thread.
template <class Check>
const char* words_of(const Check& check) {
  thread_local std::string words;
  try {
    check();
    return nullptr;
  } catch (const std::exception& error) {
    words = error.what();
    return words.c_str();
  }
}

}  // namespace
}  // namespace gnaforge

/// The words that a forward call would be refused with, null if it wouldn't: what keeps the rules, and with `choose` is
/// served by a kernel that is loaded, however its inputs lie. Its tensors are query, key and value, and perhaps keys,
/// values and lengths of two further pieces, and an output and a log-sum-exp to write to. They stay good until the next
/// call on this thread.
GNAFORGE_EXPORT const char* gnaforge_core_check(const gnaforge_given tensors[11], const int64_t* pattern, size_t count,
                                                const double* scale, const char* key, int choose) {
  using namespace gnaforge;
  return words_of([&] {
    GivenForward all = look_at_inputs(tensors);
    all.scaled = tensors[9].sizes != nullptr && all.q.dtype == ScalarType::Float8_e4m3fn;
    const uint32_t out_dtype = all.scaled ? dtype_code(look(tensors[9]).dtype) : 0;
    const gnaforge_problem problem = check_forward(
        all, {pattern, pattern + count}, scale ? std::optional(*scale) : std::nullopt, key, choose != 0, out_dtype);
    check_given_results(tensors, all.q, problem);
  });
}

/// As above, of a call of forward_varlen with these tensors.
GNAFORGE_EXPORT const char* gnaforge_core_check_varlen(const gnaforge_given tensors[11], int64_t rank,
                                                       const int64_t* layouts, size_t extents, const int64_t* pattern,
                                                       size_t count, const double* scale, const char* key, int choose) {
  using namespace gnaforge;
  return words_of([&] {
    const std::vector<int64_t> numbers(layouts, layouts + extents);
    const Layouts given_layouts(rank, numbers);
    const GivenForward all = look_at_inputs(tensors);
    const gnaforge_problem whole =
        gather_packed(all, scale ? std::optional(*scale) : std::nullopt, false, given_layouts.count());
    check_given_results(tensors, all.q, whole);
    Call call(GNAFORGE_GNA_FORWARD, whole, all.q);
    assume_tensors(call, all, whole);
    const Slices slices = slices_of_samples(whole, given_layouts, {pattern, pattern + count});
    call.check_slices(slices, key, choose != 0 && whole.batch > 0 && whole.heads > 0);
  });
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
