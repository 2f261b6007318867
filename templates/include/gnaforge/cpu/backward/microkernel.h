// What a panel of lanes does between the products of a backward pass. No include guard, see vector.h.

namespace gnaforge::cpu::GNAFORGE_ISA {

/// Log-sum-exp (in log2) and delta of queries: of the lanes, or of the rows, whichever they are.
struct Statistics {
  const float* lse;
  const float* delta;
};

/// P^T = 2^(S^T - lse) and dS^T = P^T (dP^T - delta), in place of S^T and dP^T. Where `Careful`, lanes that a row has
/// nothing to do with get 0, whatever dP is; `rows` says which.
template <int Width, bool PerRow, bool Careful>
inline void differentiate(const KeyList& rows, float* scores, float* slopes, const Statistics& of) {
  constexpr int panel = Width * lanes;
  for (int w = 0; w < Width; ++w)
    for (int row = 0; row < rows.count; ++row) {
      float* const score = scores + row * panel + w * lanes;
      float* const slope = slopes + row * panel + w * lanes;
      const Vector lse = PerRow ? broadcast(of.lse[row]) : load(of.lse + w * lanes);
      const Vector delta = PerRow ? broadcast(of.delta[row]) : load(of.delta + w * lanes);
      const Vector probability = exp2(load(score) - lse);
      Vector found = probability * (load(slope) - delta);
      if (Careful) {
        const IntVector visible = expand_bits(rows.visible[row] >> (w * lanes));
        found = visible ? found : Vector{};
      }
      store(score, probability);
      store(slope, found);
    }
}

}  // namespace gnaforge::cpu::GNAFORGE_ISA
