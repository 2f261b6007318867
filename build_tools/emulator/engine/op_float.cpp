// PTX ISA: Floating-Point Instructions; Half-Precision Floating-Point Instructions; packed f32x2.
#include <cfenv>
#include <cmath>

#include "formats.h"
#include "opcodes.h"

namespace gnaforge::emulator {
namespace {

enum class Op : uint8_t {
  add,
  sub,
  mul,
  fma,
  div,
  min,
  max,
  abs,
  neg,
  rcp,
  sqrt,
  rsqrt,
  ex2,
  lg2,
  sin,
  cos,
  tanh,
  copysign
};

// Modifiers, as bits of detail[0].
constexpr int kFlush = 1, kSaturate = 2, kRelu = 4, kNan = 8;

inline float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }
inline double flush(double x) { return x; }

template <Op O, class T>
inline T evaluate(T a, T b, T c) {
  if constexpr (O == Op::add) return a + b;
  if constexpr (O == Op::sub) return a - b;
  if constexpr (O == Op::mul) return a * b;
  if constexpr (O == Op::fma) return std::fma(a, b, c);
  if constexpr (O == Op::div) return a / b;
  // A NaN loses against a number; -0 is less than +0.
  if constexpr (O == Op::min) return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? a : b) : a < b ? a : b;
  if constexpr (O == Op::max) return a != a ? b : b != b ? a : a == b ? (std::signbit(a) ? b : a) : a > b ? a : b;
  if constexpr (O == Op::abs) return std::fabs(a);
  if constexpr (O == Op::neg) return -a;
  if constexpr (O == Op::rcp) return T{1} / a;
  if constexpr (O == Op::sqrt) return std::sqrt(a);
  if constexpr (O == Op::rsqrt) return T{1} / std::sqrt(a);
  if constexpr (O == Op::ex2) return std::exp2(a);
  if constexpr (O == Op::lg2) return std::log2(a);
  if constexpr (O == Op::sin) return std::sin(a);
  if constexpr (O == Op::cos) return std::cos(a);
  if constexpr (O == Op::tanh) return std::tanh(a);
  if constexpr (O == Op::copysign) return std::copysign(b, a);
  return a;
}

constexpr int sources_of(Op op) { return op == Op::fma ? 3 : op <= Op::max || op == Op::copysign ? 2 : 1; }

template <class T>
inline T finish(T x, int modifiers) {
  if (modifiers & kFlush) x = flush(x);
  if (modifiers & kSaturate) x = x != x ? T{0} : x < 0 ? T{0} : x > 1 ? T{1} : x;
  if ((modifiers & kRelu) && !(x != x)) x = x < 0 ? T{0} : x;
  return x;
}

/// f32 and f64.
template <Op O, class T>
Status real(Warp& warp, const Instruction& in, uint32_t mask) {
  constexpr int kSources = sources_of(O);
  const T* a = warp.in<T>(in.args[1]);
  const T* b = kSources > 1 ? warp.in<T>(in.args[2]) : a;
  const T* c = kSources > 2 ? warp.in<T>(in.args[3]) : a;
  alignas(64) T result[kWarpSize];
  int modifiers = in.detail[0];
  if (modifiers == 0) {
    for (int i = 0; i < kWarpSize; ++i) result[i] = evaluate<O>(a[i], b[i], c[i]);
  } else if (modifiers == kFlush) {
    for (int i = 0; i < kWarpSize; ++i) result[i] = flush(evaluate<O>(flush(a[i]), flush(b[i]), flush(c[i])));
  } else {
    bool flushes = modifiers & kFlush;
    for (int i = 0; i < kWarpSize; ++i) {
      T x = flushes ? flush(a[i]) : a[i], y = flushes ? flush(b[i]) : b[i], z = flushes ? flush(c[i]) : c[i];
      result[i] = finish(evaluate<O>(x, y, z), modifiers);
      if ((modifiers & kNan) && (x != x || (kSources > 1 && y != y))) result[i] = static_cast<T>(as_float(0x7fffffffu));
    }
  }
  if constexpr (sizeof(T) == 4 && O != Op::abs && O != Op::neg && O != Op::copysign && O != Op::min && O != Op::max)
    for (int i = 0; i < kWarpSize; ++i)
      if (result[i] != result[i]) result[i] = as_float(0x7fffffffu);  // the NaN that the hardware makes
  warp.put(in.args[0], mask, result);
  return Status::next;
}

/// Runs `Plain` in another rounding mode.
template <Handler Plain>
Status rounded(Warp& warp, const Instruction& in, uint32_t mask) {
  static Handler volatile indirect = Plain;  // not inlined: nothing may move across the change of mode
  int before = std::fegetround();
  std::fesetround(in.detail[1]);
  Status status = indirect(warp, in, mask);
  std::fesetround(before);
  return status;
}

/// Half-precision types, one or two per register: computed in f32 (f64 for fma, so that it rounds once).
template <Op O, bool Brain, int Lanes>
Status half(Warp& warp, const Instruction& in, uint32_t mask) {
  constexpr int kSources = sources_of(O);
  using Word = std::conditional_t<Lanes == 2, uint32_t, uint16_t>;
  const Word* a = warp.in<Word>(in.args[1]);
  const Word* b = kSources > 1 ? warp.in<Word>(in.args[2]) : a;
  const Word* c = kSources > 2 ? warp.in<Word>(in.args[3]) : a;
  Word result[kWarpSize];
  bool flushes = in.detail[0] & kFlush;
  auto flushed = [flushes](uint16_t bits) {
    bool subnormal = !(bits & (Brain ? 0x7f80 : 0x7c00));
    return static_cast<uint16_t>(flushes && subnormal ? bits & 0x8000 : bits);
  };
  auto part = [&](Word w, int half) { return flushed(static_cast<uint16_t>(w >> (16 * half))); };
  auto widen = [&](Word w, int half) {
    return static_cast<double>(Brain ? from_bf16(part(w, half)) : from_f16(part(w, half)));
  };
  for (int i = 0; i < kWarpSize; ++i) {
    Word out = 0;
    for (int h = 0; h < Lanes; ++h) {
      double x = widen(a[i], h), y = widen(b[i], h), z = widen(c[i], h);
      double value = finish(evaluate<O>(x, y, z), in.detail[0] & ~kFlush);
      if ((in.detail[0] & kNan) && (x != x || y != y)) value = NAN;
      uint16_t bits = flushed(Brain ? to_bf16(value, Rounding::nearest_even) : to_f16(value));
      if constexpr (O == Op::neg || O == Op::abs) {  // these act on the sign bit alone
        bits = part(a[i], h);
        bits = O == Op::neg ? bits ^ 0x8000 : bits & 0x7fff;
      }
      out = static_cast<Word>(out | static_cast<Word>(bits) << (16 * h));
    }
    result[i] = out;
  }
  warp.put(in.args[0], mask, result);
  return Status::next;
}

/// Two f32 in a 64-bit register.
template <Op O>
Status packed(Warp& warp, const Instruction& in, uint32_t mask) {
  constexpr int kSources = sources_of(O);
  const float* a = warp.in<float>(in.args[1]);
  const float* b = warp.in<float>(in.args[2]);
  const float* c = kSources > 2 ? warp.in<float>(in.args[3]) : a;
  alignas(64) float result[2 * kWarpSize];
  bool flushes = in.detail[0] & kFlush;
  for (int i = 0; i < 2 * kWarpSize; ++i) {
    result[i] = flushes ? flush(evaluate<O>(flush(a[i]), flush(b[i]), flush(c[i]))) : evaluate<O>(a[i], b[i], c[i]);
  }
  uint64_t lanes[kWarpSize];
  std::memcpy(lanes, result, sizeof lanes);
  warp.put(in.args[0], mask, lanes);
  return Status::next;
}

/// max and min of three f32.
template <Op O>
Status of_three(Warp& warp, const Instruction& in, uint32_t mask) {
  const float *a = warp.in<float>(in.args[1]), *b = warp.in<float>(in.args[2]), *c = warp.in<float>(in.args[3]);
  float result[kWarpSize];
  for (int i = 0; i < kWarpSize; ++i) {
    result[i] = finish(evaluate<O>(evaluate<O>(a[i], b[i], 0.0f), c[i], 0.0f), in.detail[0]);
    if ((in.detail[0] & kNan) && (a[i] != a[i] || b[i] != b[i] || c[i] != c[i])) result[i] = as_float(0x7fffffffu);
  }
  warp.put(in.args[0], mask, result);
  return Status::next;
}

template <Op O>
void decode_float(Instruction& in) {
  constexpr int kSources = sources_of(O);
  constexpr bool kExact =
      O == Op::add || O == Op::sub || O == Op::mul || O == Op::fma || O == Op::div || O == Op::sqrt || O == Op::rcp;
  in.detail[0] = (in.has("ftz") ? kFlush : 0) | (in.has("sat") ? kSaturate : 0) | (in.has("relu") ? kRelu : 0) |
                 (in.has("NaN") ? kNan : 0);
  bool half_type = in.type >= Type::f16 && in.type <= Type::bf16x2,
       directed = in.has("rz") || in.has("rm") || in.has("rp");
  if (half_type ? directed : in.has("relu")) return;
  int size = size_of(in.type);
  auto sizes = [&] {
    expect_count(in, 1 + kSources, 1 + kSources);
    expect_sizes(in, {size, size, kSources > 1 ? size : -1, kSources > 2 ? size : -1});
  };
  constexpr bool kHalf = O <= Op::neg && O != Op::div;
  switch (in.type) {
    case Type::f32:
      if constexpr (O == Op::min || O == Op::max) {
        if (in.args.size() == 4) {
          in.run = of_three<O>;
          return;
        }
      }
      sizes();
      in.run = real<O, float>;
      break;
    case Type::f64:
      sizes();
      in.run = real<O, double>;
      break;
    case Type::f32x2:
      if constexpr (O == Op::add || O == Op::sub || O == Op::mul || O == Op::fma) {
        if (!directed && !in.has("sat")) {
          sizes();
          in.run = packed<O>;
        }
      }
      return;
    case Type::f16:
    case Type::f16x2:
    case Type::bf16:
    case Type::bf16x2:
      if constexpr (kHalf || O == Op::ex2 || O == Op::tanh) {
        sizes();
        if (in.type == Type::f16) in.run = half<O, false, 1>;
        if (in.type == Type::f16x2) in.run = half<O, false, 2>;
        if (in.type == Type::bf16) in.run = half<O, true, 1>;
        if (in.type == Type::bf16x2) in.run = half<O, true, 2>;
      }
      return;
    default: return;
  }
  int mode = in.has("rz") ? FE_TOWARDZERO : in.has("rm") ? FE_DOWNWARD : in.has("rp") ? FE_UPWARD : FE_TONEAREST;
  in.detail[1] = mode;
  if constexpr (kExact) {
    if (mode != FE_TONEAREST) in.run = in.type == Type::f32 ? rounded<real<O, float>> : rounded<real<O, double>>;
  }
}

Status test_property(Warp& warp, const Instruction& in, uint32_t mask) {
  const float* a = warp.in<float>(in.args[1]);
  uint32_t bits = 0;
  for (int i = 0; i < kWarpSize; ++i) {
    int kind = std::fpclassify(a[i]);
    bool is = false;
    switch (in.detail[0]) {
      case 0: is = kind != FP_NAN && kind != FP_INFINITE; break;
      case 1: is = kind == FP_INFINITE; break;
      case 2: is = kind != FP_NAN; break;
      case 3: is = kind == FP_NAN; break;
      case 4: is = kind == FP_NORMAL; break;
      default: is = kind == FP_SUBNORMAL; break;
    }
    bits |= uint32_t{is} << i;
  }
  warp.put_predicate(in.args[0], mask, bits);
  return Status::next;
}
void decode_testp(Instruction& in) {
  static const char* const kNames[] = {"finite", "infinite", "number", "notanumber", "normal", "subnormal"};
  for (int i = 0; i < 6; ++i)
    if (in.mode() == kNames[i] && in.type == Type::f32) {
      in.detail[0] = i;
      in.run = test_property;
    }
}

}  // namespace

std::vector<Opcode> float_opcodes() {
  return {
      {"add", "Floating Point: add", decode_float<Op::add>, "rn rz rm rp ftz sat"},
      {"sub", "Floating Point: sub", decode_float<Op::sub>, "rn rz rm rp ftz sat"},
      {"mul", "Floating Point: mul", decode_float<Op::mul>, "rn rz rm rp ftz sat"},
      {"fma", "Floating Point: fma", decode_float<Op::fma>, "rn rz rm rp ftz sat relu"},
      {"mad", "Floating Point: mad", decode_float<Op::fma>, "rn rz rm rp ftz sat"},
      {"div", "Floating Point: div", decode_float<Op::div>, "approx full rn rz rm rp ftz"},
      {"min", "Floating Point: min", decode_float<Op::min>, "ftz NaN"},
      {"max", "Floating Point: max", decode_float<Op::max>, "ftz NaN"},
      {"abs", "Floating Point: abs", decode_float<Op::abs>, "ftz"},
      {"neg", "Floating Point: neg", decode_float<Op::neg>, "ftz"},
      {"rcp", "Floating Point: rcp", decode_float<Op::rcp>, "approx rn rz rm rp ftz"},
      {"sqrt", "Floating Point: sqrt", decode_float<Op::sqrt>, "approx rn rz rm rp ftz"},
      {"rsqrt", "Floating Point: rsqrt", decode_float<Op::rsqrt>, "approx ftz"},
      {"ex2", "Floating Point: ex2", decode_float<Op::ex2>, "approx ftz"},
      {"lg2", "Floating Point: lg2", decode_float<Op::lg2>, "approx ftz"},
      {"sin", "Floating Point: sin", decode_float<Op::sin>, "approx ftz"},
      {"cos", "Floating Point: cos", decode_float<Op::cos>, "approx ftz"},
      {"tanh", "Floating Point: tanh", decode_float<Op::tanh>, "approx"},
      {"copysign", "Floating Point: copysign", decode_float<Op::copysign>},
      {"testp", "Floating Point: testp", decode_testp, "finite infinite number notanumber normal subnormal"},
  };
}

}  // namespace gnaforge::emulator
