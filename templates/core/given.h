// What an operator is given: tensors as far as the rules look at them, and the problem that they make. Calls that torch
// only traces have no data, and are held to the same rules, in the same words, as calls that run.
#pragma once

#include <cmath>
#include <cstring>
#include <optional>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include <torch/csrc/stable/tensor.h>

#include "error.h"
#include "gnaforge/abi.h"

namespace gnaforge {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  raise(ErrorCode::bad_input, text.str());
}

inline uint32_t dtype_code(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return GNAFORGE_FP32;
    case ScalarType::BFloat16: return GNAFORGE_BF16;
    case ScalarType::Half: return GNAFORGE_FP16;
    case ScalarType::Int: return GNAFORGE_INT32;
    case ScalarType::Float8_e4m3fn: return GNAFORGE_E4M3;
    default: return 0;
  }
}

/// Torch's names, which its C interface doesn't tell.
struct TypeName {
  ScalarType type;
  const char* name;
};
constexpr TypeName type_names[] = {
    {ScalarType::Float, "float32"},
    {ScalarType::BFloat16, "bfloat16"},
    {ScalarType::Half, "float16"},
    {ScalarType::Double, "float64"},
    {ScalarType::Char, "int8"},
    {ScalarType::Short, "int16"},
    {ScalarType::Int, "int32"},
    {ScalarType::Long, "int64"},
    {ScalarType::Byte, "uint8"},
    {ScalarType::Bool, "bool"},
    {ScalarType::ComplexHalf, "complex32"},
    {ScalarType::ComplexFloat, "complex64"},
    {ScalarType::ComplexDouble, "complex128"},
    {ScalarType::Float8_e4m3fn, "float8_e4m3fn"},
    {ScalarType::Float8_e5m2, "float8_e5m2"},
    {ScalarType::Float8_e5m2fnuz, "float8_e5m2fnuz"},
    {ScalarType::Float8_e4m3fnuz, "float8_e4m3fnuz"},
    {ScalarType::Float8_e8m0fnu, "float8_e8m0fnu"},
    {ScalarType::Float4_e2m1fn_x2, "float4_e2m1fn_x2"},
    {ScalarType::Undefined, "of another type"},
};

inline const char* type_name(ScalarType type) {
  for (const TypeName& known : type_names)
    if (known.type == type) return known.name;
  return "of another type";
}

inline ScalarType type_named(const char* name) {
  for (const TypeName& known : type_names)
    if (std::strcmp(known.name, name) == 0) return known.type;
  return ScalarType::Undefined;
}

/// A tensor. Its sizes are somebody else's.
struct Given {
  const char* name;
  const int64_t* sizes;
  int64_t dims;
  ScalarType dtype;
  DeviceType device;
  int32_t device_index;
};

inline Given given(const Tensor& tensor, const char* name) {
  int64_t* sizes = nullptr;
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &device));
  return {name, sizes, tensor.dim(), tensor.scalar_type(), static_cast<DeviceType>(device), tensor.get_device_index()};
}

/// A piece of keys and values [batch, tokens, heads, channels] that all queries see, and how many of them count, int32
/// [batch]; any of the three may be missing. They have names for what is wrong with them, also while they are missing.
struct GivenPiece {
  const char *k_name, *v_name, *lengths_name;
  std::optional<Given> k, v, lengths;
};
constexpr GivenPiece no_piece{"additional_keys", "additional_values", "additional_lengths", {}, {}, {}};

/// The tensors of a forward call.
struct GivenForward {
  Given q, k, v;
  GivenPiece pieces[GNAFORGE_MAX_EXTRA];
  bool scaled = false;  ///< Of the operator for inputs of 8 bits, whose results are of another dtype.
};

/// The dtypes that a call's inputs may have.
inline void check_dtype(const Given& t, bool scaled) {
  const uint32_t dtype = dtype_code(t.dtype);
  if (scaled && dtype != GNAFORGE_E4M3)
    refuse(t.name, " must be float8_e4m3fn where there are descales or an out_dtype, got ", type_name(t.dtype));
  if (scaled || (dtype != 0 && dtype != GNAFORGE_INT32 && dtype != GNAFORGE_E4M3)) return;
  const std::string_view name = type_name(t.dtype);
  const bool narrow = name.substr(0, 6) == "float8" || name.substr(0, 6) == "float4";
  refuse(t.name, " must be float32, bfloat16 or float16, got ", name,
         narrow ? "; of 8 bits na1d, na2d and na3d take float8_e4m3fn" : "");
}

inline std::string sizes_text(const int64_t* sizes, size_t dims) {
  std::string text = "[";
  for (size_t d = 0; d < dims; ++d) text += (d ? ", " : "") + std::to_string(sizes[d]);
  return text + "]";
}

inline std::string shape_text(const Given& tensor) {
  return sizes_text(tensor.sizes, static_cast<size_t>(tensor.dims));
}

inline bool has_index(DeviceType device) { return device != DeviceType::CPU && device != DeviceType::Meta; }

inline std::string device_text(const Given& tensor) {
  std::string text;
  switch (tensor.device) {
    case DeviceType::CPU: text = "cpu"; break;
    case DeviceType::CUDA: text = "cuda"; break;
    case DeviceType::Meta: text = "meta"; break;
    case DeviceType::XPU: text = "xpu"; break;
    case DeviceType::MPS: text = "mps"; break;
    case DeviceType::XLA: text = "xla"; break;
    case DeviceType::HPU: text = "hpu"; break;
    case DeviceType::MTIA: text = "mtia"; break;
    default: text = "a device of type " + std::to_string(static_cast<int>(tensor.device));
  }
  return has_index(tensor.device) && tensor.device_index >= 0 ? text + ":" + std::to_string(tensor.device_index) : text;
}

inline void check_device(const Given& t, const Given& q) {
  if (t.device != q.device || (has_index(q.device) && t.device_index != q.device_index))
    refuse("query, key and value must be on one device: ", q.name, " is on ", device_text(q), ", ", t.name, " is on ",
           device_text(t));
}

inline void check_kind(const Given& t, const Given& q) {
  if (t.dtype != q.dtype)
    refuse("query, key and value must have one dtype: ", q.name, " is ", type_name(q.dtype), ", ", t.name, " is ",
           type_name(t.dtype), "; cast them to one, or call under torch.autocast, which does");
  check_device(t, q);
}

/// The numbers of each dim that `pattern` holds: the fields of gnaforge_problem from window to causal, and perhaps
/// those from edge to kv_sink, whose kv_tokens are the key tensor's, as is a grid of 0. No other count is possible: it
/// would be ambiguous which rank a list is of.
constexpr size_t plain_groups = 4, all_groups = 10;

/// Refuses a tensor of other sizes than these; -1 stands for any number of tokens.
inline void check_shape(const Given& t, const std::vector<int64_t>& wanted, const char* like) {
  bool same = t.dims == static_cast<int64_t>(wanted.size());
  for (size_t d = 0; same && d < wanted.size(); ++d) same = wanted[d] == -1 || t.sizes[d] == wanted[d];
  if (same) return;
  std::string text;
  for (const int64_t size : wanted) text += (text.empty() ? "" : ", ") + (size == -1 ? "tokens" : std::to_string(size));
  refuse(t.name, " has shape ", shape_text(t), "; beside ", like, " it must be [", text, "]");
}

/// A piece of extra keys, all or nothing of it. Returns its tokens. It has a row for each batch entry, or of packed
/// `samples` one for each of them.
inline int64_t gather_piece(const GivenPiece& piece, const Given& q, const gnaforge_problem& p,
                            std::optional<int64_t> samples) {
  if (!piece.k && !piece.v && !piece.lengths) return 0;
  if (!piece.k && !piece.v) refuse(piece.lengths_name, " come with ", piece.k_name, " and ", piece.v_name);
  if (!piece.k || !piece.v) refuse(piece.k_name, " and ", piece.v_name, " come together");
  const int64_t rows = p.batch * samples.value_or(1);
  check_shape(*piece.k, {rows, -1, p.kv_heads, p.head_dim}, samples ? "layouts and key" : "query and key");
  check_shape(*piece.v, {rows, piece.k->sizes[1], p.kv_heads, p.value_head_dim}, piece.k_name);
  check_kind(*piece.k, q);
  check_kind(*piece.v, q);
  if (piece.lengths) {
    check_shape(*piece.lengths, {rows}, samples ? "layouts" : "query");
    if (dtype_code(piece.lengths->dtype) != GNAFORGE_INT32)
      refuse(piece.lengths_name, " must be int32, got ", type_name(piece.lengths->dtype));
    check_device(*piece.lengths, q);
  }
  return piece.k->sizes[1];
}

/// Puts a pattern into a problem whose rank and tokens are known.
inline void take_pattern(gnaforge_problem& p, const int64_t* next, bool plain) {
  const auto take = [&next, &p](int64_t* field) {
    for (int d = 0; d < p.rank; ++d) field[d] = *next++;
  };
  for (int64_t* field : {p.window, p.stride, p.dilation, p.causal}) take(field);
  for (int d = 0; d < p.rank; ++d) p.grid[d] = p.kv_tokens[d];
  if (!plain)
    for (int64_t* field : {p.edge, p.sink, p.grid, p.q_offset, p.kv_offset, p.kv_sink}) take(field);
  for (int d = 0; d < p.rank; ++d)
    if (p.grid[d] == 0) p.grid[d] = p.kv_tokens[d];
}

/// Puts the tensors' shapes and the pattern into the contract's form, which `rules` judges then. `samples`: as
/// gather_piece has it.
inline gnaforge_problem gather(const GivenForward& tensors, const int64_t* pattern, size_t count,
                               std::optional<double> scale, std::optional<int64_t> samples = {}) {
  const Given &q = tensors.q, &k = tensors.k, &v = tensors.v;
  size_t rank = 1;
  while (rank < GNAFORGE_MAX_RANK && count != rank * plain_groups && count != rank * all_groups) ++rank;
  const bool plain = count == rank * plain_groups;
  if (!plain && count != rank * all_groups)
    refuse(
        "pattern must hold window, stride, dilation and causal of 1 to 3 dimensions, perhaps also edge, sink, grid, "
        "q_offset, kv_offset and kv_sink; got ",
        count, " numbers");
  // Queries and keys may be parts of a grid, if there is one; there may be any number of queries that see all keys. The
  // values' extent is always the keys'.
  const int64_t *const window = pattern, *const dilation = window + 2 * rank, *const causal = dilation + rank;
  const int64_t *const edge = plain ? nullptr : causal + rank, *const grid = plain ? nullptr : edge + 2 * rank;
  bool as_many = true, differ = false;
  const bool comparable = q.dims == static_cast<int64_t>(rank) + 3 && k.dims == q.dims;
  for (size_t d = 0; d < rank && comparable; ++d) {
    const bool dense = window[d] == k.sizes[d + 1] && dilation[d] == 1 && causal[d] == GNAFORGE_CAUSAL_NONE &&
                       (plain || edge[d] != GNAFORGE_EDGE_CUT);
    differ = differ || k.sizes[d + 1] != q.sizes[d + 1];
    as_many = as_many && (dense || (grid && grid[d] != 0) || k.sizes[d + 1] == q.sizes[d + 1]);
  }
  const Given& key_like = differ && as_many ? k : q;
  for (const Given* t : {&q, &k, &v}) {
    if (t->dims != static_cast<int64_t>(rank) + 3)
      refuse(t->name, " must be [batch, ", rank, " token dims, heads, head_dim], got shape ", shape_text(*t));
    check_dtype(*t, tensors.scaled);
    check_kind(*t, q);
    bool agree = t->sizes[0] == q.sizes[0];
    for (size_t d = 1; d <= rank; ++d) agree = agree && (t == &q || t->sizes[d] == key_like.sizes[d]);
    const Given& like = t->sizes[0] == q.sizes[0] ? key_like : q;
    if (!agree)
      refuse(t->name, " has shape ", shape_text(*t), ", ", like.name, " has ", shape_text(like),
             "; batch and token dims must agree");
  }
  gnaforge_problem p{};
  p.struct_size = sizeof(p);
  p.rank = static_cast<int>(rank);
  p.batch = q.sizes[0];
  p.heads = q.sizes[rank + 1];
  p.kv_heads = k.sizes[rank + 1];
  p.head_dim = q.sizes[rank + 2];
  p.value_head_dim = v.sizes[rank + 2];
  if (scale && !std::isfinite(*scale)) refuse("scale is ", *scale, "; it must be finite");
  p.scale = scale ? *scale : 1.0 / std::sqrt(static_cast<double>(p.head_dim));
  if (k.sizes[rank + 2] != p.head_dim) refuse("key has head_dim ", k.sizes[rank + 2], ", query has ", p.head_dim);
  if (v.sizes[rank + 1] != p.kv_heads) refuse("key has ", p.kv_heads, " heads, value has ", v.sizes[rank + 1]);
  for (size_t d = 0; d < rank; ++d) {
    p.tokens[d] = q.sizes[d + 1];
    p.kv_tokens[d] = k.sizes[d + 1];
  }
  take_pattern(p, pattern, plain);
  for (int piece = 0; piece < GNAFORGE_MAX_EXTRA; ++piece)
    p.extra_tokens[piece] = gather_piece(tensors.pieces[piece], tensors.q, p, samples);
  return p;
}

/// As above, of packed samples: the problem of one that has all tokens, of rank 1. There may be other numbers of
/// queries and keys only where `apart`.
inline gnaforge_problem gather_packed(const GivenForward& tensors, std::optional<double> scale, bool apart = false,
                                      std::optional<int64_t> samples = {}) {
  const int64_t all[] = {apart && tensors.k.dims == 4 ? tensors.k.sizes[1] : 1, 1, 1, GNAFORGE_CAUSAL_NONE};
  return gather(tensors, all, plain_groups, scale, samples);
}

/// Refuses results of the caller's that can't hold those of a call: an output of these sizes, and a log-sum-exp.
inline void check_results(const Given& out, int64_t last_stride, const Given& lse, const Given& q,
                          std::vector<int64_t> sizes) {
  check_shape(out, sizes, "query and value");
  const bool has_channels = sizes.back() > 1;
  sizes.pop_back();
  check_shape(lse, sizes, q.name);
  const bool scaled = q.dtype == ScalarType::Float8_e4m3fn;
  if (scaled && out.dtype != ScalarType::BFloat16 && out.dtype != ScalarType::Half)
    refuse(out.name, " is ", type_name(out.dtype), "; of float8_e4m3fn it must be bfloat16 or float16");
  if (!scaled && out.dtype != q.dtype)
    refuse(out.name, " is ", type_name(out.dtype), "; it must be ", type_name(q.dtype), " as query");
  if (lse.dtype != ScalarType::Float) refuse(lse.name, " is ", type_name(lse.dtype), "; it must be float32");
  check_device(out, q);
  check_device(lse, q);
  if (has_channels && last_stride != 1)
    refuse(out.name, " has a last stride of ", last_stride, "; its channels must be contiguous");
}

}  // namespace gnaforge
