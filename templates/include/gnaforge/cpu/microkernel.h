// The arithmetic of one panel of queries (`lanes * Width` of them, one per lane) against one batch of keys: scores,
// softmax, and the product with V. No include guard, see vector.h.

namespace gnaforge::cpu::GNAFORGE_ISA {

/// Vectors that a panel is wide: two hide more of the loads, one where two would leave a quarter of the lanes idle.
template <int Rows>
constexpr int panel_width() {
  constexpr int vectors = (Rows + lanes - 1) / lanes;
  return vectors % 2 == 0 || vectors > 4 ? 2 : 1;
}

/// Rows of keys, values and masks that a panel attends to. Up to block_rows - 1 entries past `count` are readable.
struct KeyList {
  int count;
  const float* k[batch_keys + block_rows];
  const float* v[batch_keys + block_rows];
  std::uint32_t visible[batch_keys + block_rows];  ///< One bit per lane.
};

/// Running state of a panel's softmax, one query per lane.
template <int Width>
struct Softmax {
  Vector max[Width];
  Vector sum[Width];
};

/// S^T = K Q^T into `scores`, one row of the panel per key, -infinity where Masked and not visible; raises `max`.
/// Rows are computed in blocks; those past keys.count repeat the last key and change nothing.
template <int Width, bool Masked>
inline void score_keys(const KeyList& keys, const float* q, int head_dim, float* scores, Vector (&max)[Width]) {
  constexpr int panel = Width * lanes;
  for (int first = 0; first < keys.count; first += block_rows) {
    const float* row[block_rows];
    Vector sum[block_rows][Width];
    for (int r = 0; r < block_rows; ++r) {
      row[r] = keys.k[first + r];
      for (int w = 0; w < Width; ++w) sum[r][w] = Vector{};
    }
    for (int d = 0; d < head_dim; ++d) {
      Vector query[Width];
      for (int w = 0; w < Width; ++w) query[w] = load(q + d * panel + w * lanes);
      for (int r = 0; r < block_rows; ++r) {
        const Vector key = broadcast(row[r][d]);
        for (int w = 0; w < Width; ++w) sum[r][w] += key * query[w];
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < block_rows; ++r)
      for (int w = 0; w < Width; ++w) {
        Vector score = sum[r][w];
        if (Masked) {
          const IntVector visible = expand_bits(keys.visible[first + r] >> (w * lanes));
          score = visible ? score : broadcast(-__builtin_inff());
        }
        max[w] = GNAFORGE_ISA::max(score, max[w]);
        store(scores + (first + r) * panel + w * lanes, score);
      }
  }
}

/// P^T = 2^(S^T - max) in place; updates the sums and returns in `rescale` what earlier sums must be multiplied by.
template <int Width>
inline void exponentiate(int count, float* scores, const Vector (&max)[Width], Softmax<Width>& state,
                         Vector (&rescale)[Width]) {
  constexpr int panel = Width * lanes;
  for (int w = 0; w < Width; ++w) {
    // A lane that has seen no key yet keeps -infinity, which must not be subtracted from itself.
    const Vector base = max[w] == -__builtin_inff() ? Vector{} : max[w];
    rescale[w] = exp2(state.max[w] - base);
    Vector sum = state.sum[w] * rescale[w];
    for (int key = 0; key < count; ++key) {
      float* at = scores + key * panel + w * lanes;
      const Vector probability = exp2(load(at) - base);
      sum += probability;
      store(at, probability);
    }
    state.max[w] = max[w];
    state.sum[w] = sum;
  }
}

/// O^T = O^T * rescale + V^T P^T.
template <int Width>
inline void accumulate(const KeyList& keys, const float* probabilities, int value_head_dim,
                       const Vector (&rescale)[Width], float* out) {
  constexpr int panel = Width * lanes;
  for (int first = 0; first < value_head_dim; first += block_channels) {
    Vector sum[block_channels][Width];
    for (int c = 0; c < block_channels; ++c)
      for (int w = 0; w < Width; ++w) sum[c][w] = load(out + (first + c) * panel + w * lanes) * rescale[w];
    for (int key = 0; key < keys.count; ++key) {
      const float* value = keys.v[key] + first;
      Vector probability[Width];
      for (int w = 0; w < Width; ++w) probability[w] = load(probabilities + key * panel + w * lanes);
      for (int c = 0; c < block_channels; ++c) {
        const Vector channel = broadcast(value[c]);
        for (int w = 0; w < Width; ++w) sum[c][w] += channel * probability[w];
      }
    }
    for (int c = 0; c < block_channels; ++c)
      for (int w = 0; w < Width; ++w) store(out + (first + c) * panel + w * lanes, sum[c][w]);
  }
}

/// The same, but leaves keys that a lane doesn't see out of its sum, where `accumulate` multiplies their values by 0.
template <int Width>
inline void accumulate_visible(const KeyList& keys, const float* probabilities, int value_head_dim,
                               const Vector (&rescale)[Width], float* out) {
  constexpr int panel = Width * lanes;
  for (int w = 0; w < Width; ++w)
    for (int c = 0; c < value_head_dim; ++c) {
      float* at = out + c * panel + w * lanes;
      Vector sum = load(at) * rescale[w];
      for (int key = 0; key < keys.count; ++key) {
        const Vector more = sum + keys.v[key][c] * load(probabilities + key * panel + w * lanes);
        sum = expand_bits(keys.visible[key] >> (w * lanes)) ? more : sum;
      }
      store(at, sum);
    }
}

}  // namespace gnaforge::cpu::GNAFORGE_ISA
