// Tensors of a call as kernels address them. Host only.
#pragma once

#include <cstdint>

#include "gnaforge/names.h"

namespace gnaforge::cpu {

/// A tensor whose channels are contiguous.
template <class T, int Rank>
struct View {
  T* data;
  std::int64_t batch_stride;
  std::int64_t token_stride[Rank];
  std::int64_t head_stride;

  explicit View(const gnaforge_tensor& tensor)
      : data(static_cast<T*>(tensor.data)), batch_stride(tensor.batch_stride), head_stride(tensor.head_stride) {
    for (int d = 0; d < Rank; ++d) token_stride[d] = tensor.token_stride[d];
  }
  View() : data(nullptr), batch_stride(0), token_stride{}, head_stride(0) {}
};

/// Keys and values beside the grid's, which all queries see: [batch, tokens, kv heads, channels].
template <class T>
struct ExtraPiece {
  std::int64_t tokens = 0;  ///< 0: there is no such piece.
  View<const T, 1> k, v;
  const std::int32_t* lengths = nullptr;  ///< Tokens that count, by batch entry; null: all do.
  std::int64_t length_stride = 0;

  ExtraPiece() = default;
  ExtraPiece(const gnaforge_args& args, int piece)
      : tokens(args.problem->extra_tokens[piece]),
        k(*tensor_of(args, GNAFORGE_EXTRA_K + piece)),
        v(*tensor_of(args, GNAFORGE_EXTRA_V + piece)) {
    const gnaforge_tensor* const given = tensor_of(args, GNAFORGE_EXTRA_LENGTHS + piece);
    if (given == nullptr) return;
    lengths = static_cast<const std::int32_t*>(given->data);
    length_stride = given->batch_stride;
  }

  /// Tokens of a batch entry that count; what is beyond them is not read.
  std::int64_t count(std::int64_t batch) const {
    if (lengths == nullptr) return tokens;
    const std::int64_t length = lengths[batch * length_stride];
    return length < 0 ? 0 : length < tokens ? length : tokens;
  }
};

}  // namespace gnaforge::cpu
