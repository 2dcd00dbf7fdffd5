// Vectors of floats for the kernels' units, the same source for every instruction set.
//
// Everything here has internal linkage: were a function shared between units, the linker could keep
// the AVX-512 copy for all of them.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernel.h"

namespace fastokd {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// GCC and Clang vectors: + - * / and comparisons work lane by lane, a * b + c becomes an FMA.
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecInt __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecUnsigned __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecShort __attribute__((vector_size(2 * kLanes)));

constexpr float kInfinity = __builtin_inff();
constexpr float kNan = __builtin_nanf("");

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline Vec splat(float x) { return Vec{} + x; }
inline VecInt as_int(Vec x) { return (VecInt)x; }
inline Vec as_float(VecInt x) { return (Vec)x; }
inline Vec select(VecInt mask, Vec yes, Vec no) { return mask ? yes : no; }
// b where either is NaN, as the instruction does.
#if defined(__AVX512F__)
inline Vec max(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
inline bool any(VecInt mask) { return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask); }
#elif defined(__AVX2__)
inline Vec max(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
inline bool any(VecInt mask) { return _mm256_movemask_epi8((__m256i)mask); }
#else
inline Vec max(Vec a, Vec b) { return select(a > b, a, b); }
inline bool any(VecInt mask) {
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= mask[i];
  return bits;
}
#endif

// Over the lanes, by halves.
template <typename Op>
inline float fold(Vec x, Op op) {
#if defined(__AVX512F__)
  x = op(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  x = op(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3));
  x = op(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1));
  x = op(x, __builtin_shufflevector(x, x, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0));
#elif defined(__AVX2__)
  x = op(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
  x = op(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 2, 3, 0, 1));
  x = op(x, __builtin_shufflevector(x, x, 1, 0, 1, 0, 1, 0, 1, 0));
#else
  x = op(x, __builtin_shufflevector(x, x, 2, 3, 0, 1));
  x = op(x, __builtin_shufflevector(x, x, 1, 0, 1, 0));
#endif
  return x[0];
}
inline float sum(Vec x) {
  return fold(x, [](Vec a, Vec b) { return a + b; });
}
inline float max(Vec x) {
  return fold(x, [](Vec a, Vec b) { return max(a, b); });
}

// Four sums at once: a fold's steps wait for one another, those of four don't.
inline void sum4(float* to, Vec a, Vec b, Vec c, Vec d) {
  typedef float Quad __attribute__((vector_size(16)));
  auto quad = [](Vec x) {
#if defined(__AVX512F__)
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)x),
                                      _mm512_extractf32x8_ps((__m512)x, 1));
    return (Quad)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
    return (Quad)_mm_add_ps(_mm256_castps256_ps128((__m256)x),
                            _mm256_extractf128_ps((__m256)x, 1));
#else
    return x;
#endif
  };
  const Quad p = quad(a), q = quad(b), r = quad(c), s = quad(d);
  const Quad pq = __builtin_shufflevector(p, q, 0, 4, 1, 5) + __builtin_shufflevector(p, q, 2, 6, 3, 7);
  const Quad rs = __builtin_shufflevector(r, s, 0, 4, 1, 5) + __builtin_shufflevector(r, s, 2, 6, 3, 7);
  const Quad total =
      __builtin_shufflevector(pq, rs, 0, 1, 4, 5) + __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
  memcpy(to, &total, sizeof total);
}

// Loads and stores of whole vectors, at any alignment, from float, bfloat16 or half.
inline Vec load(const float* p) {
  Vec x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, Vec x) { memcpy(p, &x, sizeof x); }

inline Vec load(const BFloat16* p) {
#if defined(__AVX512F__)
  // Named, since GCC converts a register's halves one by one.
  const VecInt bits = (VecInt)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#else
  VecShort shorts;
  memcpy(&shorts, p, sizeof shorts);
  const VecInt bits = __builtin_convertvector(shorts, VecInt);
#endif
  return as_float(bits << 16);
}
inline void store(BFloat16* p, Vec x) {
  const VecInt bits = as_int(x);
  const VecInt rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
  const VecInt kept = x != x ? (bits | 0x400000) : rounded;
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)(kept >> 16)));
#else
  const VecShort high = __builtin_convertvector((kept >> 16) & 0xffff, VecShort);
  memcpy(p, &high, sizeof high);
#endif
}

#if defined(__AVX512F__)
inline Vec load(const Half* p) {
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
inline void store(Half* p, Vec x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
inline Vec load(const Half* p) { return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline void store(Half* p, Vec x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline Vec load(const Half* p) {
  VecShort short_bits;
  memcpy(&short_bits, p, sizeof short_bits);
  const VecInt bits = __builtin_convertvector(short_bits, VecInt);
  // The exponent is moved from bias 15 to 127 by a multiplication, which also serves subnormals.
  const Vec finite = as_float((bits & 0x7fff) << 13) * 0x1p112f;
  const VecInt special = as_int(finite) | 0x7f800000;
  const VecInt magnitude = (bits & 0x7c00) == 0x7c00 ? special : as_int(finite);
  return as_float(magnitude | ((bits & 0x8000) << 16));
}
inline void store(Half* p, Vec x) {
  const VecInt sign = as_int(x) & (VecInt{} + int32_t(0x80000000));
  const Vec magnitude = as_float(as_int(x) ^ sign);
  // Adding 2^k drops the bits that a half has no room for, rounded to nearest even, as the FPU does.
  const VecInt exponent = as_int(magnitude) & 0x7f800000;
  const VecInt floor_exponent = VecInt{} + ((127 - 14) << 23);
  const VecInt step = (exponent > floor_exponent ? exponent : floor_exponent) + (13 << 23);
  const Vec big = as_float(step);
  const Vec rounded = (magnitude + big) - big;
  const VecInt normal = (as_int(rounded) - ((127 - 15) << 23)) >> 13;
  const VecInt subnormal = __builtin_convertvector(rounded * 0x1p24f, VecInt);
  VecInt bits = rounded < splat(0x1p-14f) ? subnormal : normal;
  bits = magnitude >= splat(65520.0f) ? VecInt{} + 0x7c00 : bits;
  bits = x != x ? VecInt{} + 0x7e00 : bits;
  const VecShort low = __builtin_convertvector((bits | ((sign >> 16) & 0x8000)), VecShort);
  memcpy(p, &low, sizeof low);
}
#endif

inline VecInt lane_below(int count) {
  VecInt lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < VecInt{} + count;
}

// The first `count` elements, 0 < count < kLanes; the other lanes are `fill`. Reads and writes
// nothing beyond them.
template <typename T>
inline Vec load_part(const T* p, int count, float fill) {
  T padded[kLanes] = {};
  for (int i = 0; i < count; ++i) padded[i] = p[i];
  return select(lane_below(count), load(padded), splat(fill));
}
template <typename T>
inline void store_part(T* p, Vec x, int count) {
  T padded[kLanes];
  store(padded, x);
  for (int i = 0; i < count; ++i) p[i] = padded[i];
}
#if defined(__AVX512F__)
inline Vec load_part(const float* p, int count, float fill) {
  const __mmask16 mask = __mmask16((1u << count) - 1);
  return (Vec)_mm512_mask_loadu_ps((__m512)splat(fill), mask, p);
}
inline void store_part(float* p, Vec x, int count) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)x);
}
#endif

// e^x for x <= 88, within 1 ulp where the result is a normal number, 0 below; NaN stays.
inline Vec exp(Vec x) {
  // x = n ln2 + r, |r| <= ln2 / 2: e^x = 2^n e^r.
  x = max(splat(-88.0f), x);
  const Vec magic = splat(0x1.8p23f + 127.0f);  // its low bits hold n + 127, rounded to nearest
  const Vec shifted = x * splat(0x1.715476p0f) + magic;
  const Vec n = shifted - magic;
  Vec r = x - n * splat(0x1.62e4p-1f);  // ln2 in two parts: the first times n is exact
  r = r - n * splat(0x1.7f7d1cp-20f);
  Vec poly = splat(0.001381459878757596f);
  poly = poly * r + splat(0.008368716575205326f);
  poly = poly * r + splat(0.04166838899254799f);
  poly = poly * r + splat(0.1666652113199234f);
  poly = poly * r + splat(0.4999999403953552f);
  poly = poly * (r * r) + r;
  const Vec power = as_float(as_int(shifted) << 23);
  return poly * power + power;
}

// log x within 2 ulp for normal x > 0; NaN stays; anything for the rest.
inline Vec log(Vec x) {
  // x = 2^n (1 + f), the mantissa in [sqrt(1/2), sqrt(2)).
  const VecInt bits = (VecInt)((VecUnsigned)x - 0x3f3504f3u);  // a negative x's wraps around
  const Vec n = __builtin_convertvector(bits >> 23, Vec);
  const Vec f = as_float((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
  Vec poly = splat(-0.07634500414133072f);
  poly = poly * f + splat(0.1276157945394516f);
  poly = poly * f + splat(-0.13160182535648346f);
  poly = poly * f + splat(0.14201757311820984f);
  poly = poly * f + splat(-0.16623356938362122f);
  poly = poly * f + splat(0.20001226663589478f);
  poly = poly * f + splat(-0.2500081956386566f);
  poly = poly * f + splat(0.3333333134651184f);
  const Vec square = f * f;
  poly = poly * (square * f) - square * 0.5f;
  const Vec result = (poly + n * splat(0x1.7f7d1cp-20f) + f) + n * splat(0x1.62e4p-1f);
  return select(x != x, x, result);
}

}  // namespace
}  // namespace fastokd
