// Rows of elements to and from float, `count` a multiple of 8. No include guard, see vector.h.

namespace gnaforge::cpu::GNAFORGE_ISA {

typedef float Floats8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef std::uint32_t Words8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef std::uint16_t Halves8 __attribute__((vector_size(16), aligned(2), may_alias));

inline void widen(float* to, const float* from, int count) {
  for (int i = 0; i < count; i += 8) *reinterpret_cast<Floats8*>(to + i) = *reinterpret_cast<const Floats8*>(from + i);
}

inline void widen(float* to, const Bf16* from, int count) {
  for (int i = 0; i < count; i += 8) {
    const Words8 words = __builtin_convertvector(*reinterpret_cast<const Halves8*>(from + i), Words8);
    *reinterpret_cast<Words8*>(to + i) = words << 16;
  }
}

/// Rounds to nearest even; a NaN stays one.
inline void narrow(Bf16* to, const float* from, int count) {
  for (int i = 0; i < count; ++i) {
    std::uint32_t word;
    std::memcpy(&word, from + i, sizeof word);
    const std::uint32_t rounded = (word + 0x7fff + (word >> 16 & 1)) >> 16;
    const bool is_nan = (word & 0x7fffffff) > 0x7f800000;
    to[i].bits = static_cast<std::uint16_t>(is_nan ? (word >> 16 | 0x40) : rounded);
  }
}

#if GNAFORGE_VECTOR_BYTES >= 32  // sets with such vectors have F16C

inline void widen(float* to, const Fp16* from, int count) {
  for (int i = 0; i < count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
}

inline void narrow(Fp16* to, const float* from, int count) {
  for (int i = 0; i < count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#else

inline void widen(float* to, const Fp16* from, int count) {
  for (int i = 0; i < count; ++i) {
    const std::uint32_t half = from[i].bits;
    const std::uint32_t magnitude = (half & 0x7fff) << 13;
    // Infinity and NaN keep the largest exponent; the rest, subnormals too, is exact after scaling by 2^112.
    float value;
    std::memcpy(&value, &magnitude, sizeof value);
    value *= 0x1p112f;
    std::uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    if (magnitude >= 0x0f800000) word = magnitude | 0x7f800000;
    word |= (half & 0x8000) << 16;
    std::memcpy(to + i, &word, sizeof word);
  }
}

/// Rounds to nearest even; a NaN stays one.
inline void narrow(Fp16* to, const float* from, int count) {
  for (int i = 0; i < count; ++i) {
    std::uint32_t word;
    std::memcpy(&word, from + i, sizeof word);
    const std::uint32_t sign = word >> 16 & 0x8000;
    word &= 0x7fffffff;
    std::uint32_t half;
    if (word > 0x7f800000) {
      half = 0x7e00;
    } else if (word >= 0x477ff000) {  // rounds to 65536 or is larger
      half = 0x7c00;
    } else if (word < 0x38800000) {  // subnormal: adding 1/2 leaves multiples of 2^-24 in the low bits
      float value;
      std::memcpy(&value, &word, sizeof value);
      value += 0.5f;
      std::memcpy(&half, &value, sizeof half);
      half -= 0x3f000000;
    } else {
      half = (word + 0xfff + (word >> 13 & 1) - 0x38000000) >> 13;
    }
    to[i].bits = static_cast<std::uint16_t>(sign | half);
  }
}

#endif

inline void narrow(float* to, const float* from, int count) { std::memcpy(to, from, sizeof(float) * count); }

}  // namespace gnaforge::cpu::GNAFORGE_ISA
