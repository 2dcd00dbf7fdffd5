// Groups of fp32 lanes that load and store fp32 (Floats) or bf16 (Halves), as wide as the registers
// that the including unit is compiled for. bf16 is rounded to nearest even, a NaN to a quiet NaN.
//
// Halves hold two registers: the even elements and the odd ones. A bf16 is the upper half of its
// float, so a shift yields the first and a mask the second, where keeping the order would cost
// shuffles; vectors of one value a channel, outside the loops over rows, pay them instead.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define FASTOKD_INLINE inline __attribute__((always_inline))

namespace fastokd {
namespace {

typedef uint16_t bf16_t;

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float FloatLanes __attribute__((vector_size(4 * kLanes)));
typedef uint32_t BitLanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t IndexLanes __attribute__((vector_size(4 * kLanes)));

struct Floats {
  static constexpr int kLanes = fastokd::kLanes;
  FloatLanes v;
  static FASTOKD_INLINE Floats splat(float x) { return {x - FloatLanes{}}; }
  static FASTOKD_INLINE Floats load(const float* p) {
    Floats x;
    memcpy(&x.v, p, sizeof x.v);
    return x;
  }
  FASTOKD_INLINE void store(float* p) const { memcpy(p, &v, sizeof v); }
};

FASTOKD_INLINE Floats operator+(Floats a, Floats b) { return {a.v + b.v}; }
FASTOKD_INLINE Floats operator-(Floats a, Floats b) { return {a.v - b.v}; }
FASTOKD_INLINE Floats operator*(Floats a, Floats b) { return {a.v * b.v}; }
FASTOKD_INLINE Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return {_mm512_fmadd_ps(a.v, b.v, c.v)};
#elif defined(__AVX2__)
  return {_mm256_fmadd_ps(a.v, b.v, c.v)};
#else
  return {a.v * b.v + c.v};
#endif
}
// x where it is above zero or NaN, else zero. The processor's max returns its second operand where
// either is NaN.
FASTOKD_INLINE Floats relu(Floats x) {
#if defined(__AVX512F__)
  return {_mm512_max_ps(FloatLanes{}, x.v)};
#elif defined(__AVX2__)
  return {_mm256_max_ps(FloatLanes{}, x.v)};
#else
  return {x.v <= FloatLanes{} ? FloatLanes{} : x.v};
#endif
}
// The ReLU's gradient: `value` where `gate` is above zero or NaN, else zero.
FASTOKD_INLINE Floats keep(Floats gate, Floats value) {
  return {gate.v <= FloatLanes{} ? FloatLanes{} : value.v};
}

// One lane: the ragged last rows of a block.
struct Scalar {
  static constexpr int kLanes = 1;
  float v;
  static FASTOKD_INLINE Scalar splat(float x) { return {x}; }
  static FASTOKD_INLINE Scalar load(const float* p) { return {*p}; }
  static FASTOKD_INLINE Scalar load(const bf16_t* p) {
    const uint32_t wide = static_cast<uint32_t>(*p) << 16;
    Scalar x;
    memcpy(&x.v, &wide, sizeof wide);
    return x;
  }
  FASTOKD_INLINE void store(float* p) const { *p = v; }
  FASTOKD_INLINE void store(bf16_t* p) const {
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    *p = static_cast<bf16_t>(v != v ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};

FASTOKD_INLINE Scalar operator+(Scalar a, Scalar b) { return {a.v + b.v}; }
FASTOKD_INLINE Scalar operator-(Scalar a, Scalar b) { return {a.v - b.v}; }
FASTOKD_INLINE Scalar operator*(Scalar a, Scalar b) { return {a.v * b.v}; }
FASTOKD_INLINE Scalar fma(Scalar a, Scalar b, Scalar c) {
#if defined(__FMA__)
  return {__builtin_fmaf(a.v, b.v, c.v)};
#else
  return {a.v * b.v + c.v};
#endif
}
FASTOKD_INLINE Scalar relu(Scalar x) { return {x.v <= 0.0f ? 0.0f : x.v}; }
FASTOKD_INLINE Scalar keep(Scalar gate, Scalar value) {
  return {gate.v <= 0.0f ? 0.0f : value.v};
}

// Lanes of a (index < kLanes) and b (the others).
FASTOKD_INLINE FloatLanes pick(FloatLanes a, FloatLanes b, IndexLanes index) {
#if defined(__clang__)
  FloatLanes out;
  for (int i = 0; i < kLanes; ++i) out[i] = index[i] < kLanes ? a[index[i]] : b[index[i] - kLanes];
  return out;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

FASTOKD_INLINE void split(const float* p, Floats* even, Floats* odd) {
  const Floats low = Floats::load(p), high = Floats::load(p + kLanes);
  IndexLanes index{};
  for (int i = 0; i < kLanes; ++i) index[i] = 2 * i;
  even->v = pick(low.v, high.v, index);
  odd->v = pick(low.v, high.v, index + 1);
}
FASTOKD_INLINE void join(float* p, Floats even, Floats odd) {
  IndexLanes index{};
  for (int i = 0; i < kLanes; ++i) index[i] = i / 2 + (i % 2) * kLanes;
  Floats{pick(even.v, odd.v, index)}.store(p);
  Floats{pick(even.v, odd.v, index + kLanes / 2)}.store(p + kLanes);
}
FASTOKD_INLINE void split(const bf16_t* p, Floats* even, Floats* odd) {
  BitLanes both;
  memcpy(&both, p, sizeof both);
  even->v = reinterpret_cast<FloatLanes>(both << 16);
  odd->v = reinterpret_cast<FloatLanes>(both & 0xffff0000u);
}
// The bf16 of a float in the upper half of its lane; the lower half is arbitrary.
FASTOKD_INLINE BitLanes rounded(Floats x) {
  const BitLanes bits = reinterpret_cast<BitLanes>(x.v);
  const BitLanes up = bits + 0x7fffu + ((bits >> 16) & 1u);
  return x.v == x.v ? up : BitLanes{} + 0x7fc00000u;
}
FASTOKD_INLINE void join(bf16_t* p, Floats even, Floats odd) {
  const BitLanes both = (rounded(even) >> 16) | (rounded(odd) & 0xffff0000u);
  memcpy(p, &both, sizeof both);
}

struct Halves {
  static constexpr int kLanes = 2 * Floats::kLanes;
  Floats even, odd;
  static FASTOKD_INLINE Halves splat(float x) { return {Floats::splat(x), Floats::splat(x)}; }
  template <class E>
  static FASTOKD_INLINE Halves load(const E* p) {
    Halves x;
    split(p, &x.even, &x.odd);
    return x;
  }
  template <class E>
  FASTOKD_INLINE void store(E* p) const {
    join(p, even, odd);
  }
};

FASTOKD_INLINE Halves operator+(Halves a, Halves b) { return {a.even + b.even, a.odd + b.odd}; }
FASTOKD_INLINE Halves operator-(Halves a, Halves b) { return {a.even - b.even, a.odd - b.odd}; }
FASTOKD_INLINE Halves operator*(Halves a, Halves b) { return {a.even * b.even, a.odd * b.odd}; }
FASTOKD_INLINE Halves fma(Halves a, Halves b, Halves c) {
  return {fma(a.even, b.even, c.even), fma(a.odd, b.odd, c.odd)};
}
FASTOKD_INLINE Halves relu(Halves x) { return {relu(x.even), relu(x.odd)}; }
FASTOKD_INLINE Halves keep(Halves gate, Halves value) {
  return {keep(gate.even, value.even), keep(gate.odd, value.odd)};
}

#if defined(__AVX512F__)

// On processors with AVX512-BF16, which this unit may not assume: the caller asks cpuid. Written
// out, because the compiler keeps the intrinsic from units that don't assume it. Unlike `rounded`
// the instruction takes subnormals for zero.
struct NativeHalves : Halves {
  NativeHalves() = default;
  FASTOKD_INLINE NativeHalves(Halves x) : Halves(x) {}
  static FASTOKD_INLINE NativeHalves splat(float x) { return Halves::splat(x); }
  template <class E>
  static FASTOKD_INLINE NativeHalves load(const E* p) {
    return Halves::load(p);
  }
  FASTOKD_INLINE void store(float* p) const { join(p, even, odd); }
  FASTOKD_INLINE void store(bf16_t* p) const {
    __m512i packed;  // the even elements' bf16, then the odd ones'
    __asm__("vcvtne2ps2bf16 %2, %1, %0" : "=v"(packed) : "v"(odd.v), "v"(even.v));
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9,
                                           24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
                                           16, 0);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, packed));
  }
};

#endif

}  // namespace
}  // namespace fastokd
