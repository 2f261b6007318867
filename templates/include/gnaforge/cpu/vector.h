// Float vectors of one instruction set, GCC vector extensions. No include guard: kernel.h includes it once per
// instruction set, with GNAFORGE_ISA (a namespace) and GNAFORGE_VECTOR_BYTES set and the target of code generation
// switched.

namespace gnaforge::cpu::GNAFORGE_ISA {

typedef float Vector __attribute__((vector_size(GNAFORGE_VECTOR_BYTES)));
typedef std::int32_t IntVector __attribute__((vector_size(GNAFORGE_VECTOR_BYTES)));
typedef float UnalignedVector __attribute__((vector_size(GNAFORGE_VECTOR_BYTES), aligned(4), may_alias));
typedef float Quad __attribute__((vector_size(16)));
typedef std::int32_t IntQuad __attribute__((vector_size(16)));
typedef float UnalignedQuad __attribute__((vector_size(16), aligned(4), may_alias));

constexpr int lanes = GNAFORGE_VECTOR_BYTES / 4;

inline Vector load(const float* from) { return *reinterpret_cast<const UnalignedVector*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<UnalignedVector*>(to) = value; }
inline Vector broadcast(float value) { return value - Vector{}; }

/// The bits of `mask` as lanes: all ones where the bit is set.
inline IntVector expand_bits(std::uint32_t mask) {
  IntVector bit{};
  for (int lane = 0; lane < lanes; ++lane) bit[lane] = 1 << lane;
  return ((static_cast<std::int32_t>(mask) + IntVector{}) & bit) != 0;
}

/// The larger; `b` where either is NaN.
inline Vector max(Vector a, Vector b) { return a > b ? a : b; }

/// 2^x for x <= 0, within 1.5e-7 of it; 0 below 2^-126.5. NaN stays NaN.
inline Vector exp2(Vector x) {
  // x = n + f with |f| <= 1/2. Adding 1.5 * 2^23 rounds to an integer and leaves n + 127 in the low mantissa bits,
  // which shifted up are the float 2^n; for n = -127 they are 0.
  constexpr float rounder = 12582912.0f + 127.0f;
  x = max(broadcast(-127.0f), x);
  const Vector shifted = x + rounder;
  const Vector f = x - (shifted - rounder);
  const Vector power = (Vector)((IntVector)shifted << 23);
  // Relative minimax on [-1/2, 1/2] with the value 1 at 0, error 9.2e-8.
  Vector poly = broadcast(0x1.5bba14p-10f);
  poly = poly * f + 0x1.3cea88p-7f;
  poly = poly * f + 0x1.c6b752p-5f;
  poly = poly * f + 0x1.ebf9bcp-3f;
  poly = poly * f + 0x1.62e42ap-1f;
  poly = poly * f + 1.0f;
  return poly * power;
}

/// Four rows of four floats become columns.
inline void transpose(Quad (&m)[4]) {
#if defined(__clang__)
#define GNAFORGE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define GNAFORGE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IntQuad{__VA_ARGS__})
#endif
  const Quad ab_low = GNAFORGE_SHUFFLE(m[0], m[1], 0, 4, 1, 5);
  const Quad ab_high = GNAFORGE_SHUFFLE(m[0], m[1], 2, 6, 3, 7);
  const Quad cd_low = GNAFORGE_SHUFFLE(m[2], m[3], 0, 4, 1, 5);
  const Quad cd_high = GNAFORGE_SHUFFLE(m[2], m[3], 2, 6, 3, 7);
  m[0] = GNAFORGE_SHUFFLE(ab_low, cd_low, 0, 1, 4, 5);
  m[1] = GNAFORGE_SHUFFLE(ab_low, cd_low, 2, 3, 6, 7);
  m[2] = GNAFORGE_SHUFFLE(ab_high, cd_high, 0, 1, 4, 5);
  m[3] = GNAFORGE_SHUFFLE(ab_high, cd_high, 2, 3, 6, 7);
#undef GNAFORGE_SHUFFLE
}

}  // namespace gnaforge::cpu::GNAFORGE_ISA
