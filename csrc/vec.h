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
// NaN in either gives NaN.
inline Vec max(Vec a, Vec b) { return select((a > b) | (a != a), a, b); }

inline float sum(Vec x) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}
inline float max(Vec x) {
  float best = x[0];
  for (int i = 1; i < kLanes; ++i) best = x[i] > best || x[i] != x[i] ? x[i] : best;
  return best;
}

// Loads and stores of whole vectors, at any alignment, from float, bfloat16 or half.
inline Vec load(const float* p) {
  Vec x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, Vec x) { memcpy(p, &x, sizeof x); }

inline Vec load(const BFloat16* p) {
  VecShort bits;
  memcpy(&bits, p, sizeof bits);
  return as_float(__builtin_convertvector(bits, VecInt) << 16);
}
inline void store(BFloat16* p, Vec x) {
  const VecInt bits = as_int(x);
  const VecInt rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
  const VecInt kept = x != x ? (bits | 0x400000) : rounded;
  const VecShort high = __builtin_convertvector((kept >> 16) & 0xffff, VecShort);
  memcpy(p, &high, sizeof high);
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

// The first `count` elements, 0 < count < kLanes; the other lanes are `fill`. Reads and writes
// nothing beyond them.
template <typename T>
inline Vec load_part(const T* p, int count, float fill) {
  T padded[kLanes] = {};
  memcpy(padded, p, sizeof(T) * count);
  Vec x = load(padded);
  for (int i = 0; i < kLanes; ++i) x[i] = i < count ? x[i] : fill;
  return x;
}
template <typename T>
inline void store_part(T* p, Vec x, int count) {
  T padded[kLanes];
  store(padded, x);
  memcpy(p, padded, sizeof(T) * count);
}

// e^x within 1 ulp where the result is a normal number, 0 below; NaN stays. A softmax never goes
// above 0: x > 88 counts as 88.
inline Vec exp(Vec x) {
  // x = n ln2 + r, |r| <= ln2 / 2: e^x = 2^n e^r.
  x = select(x < splat(-88.0f), splat(-88.0f), x);
  x = select(x > splat(88.0f), splat(88.0f), x);
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

}  // namespace
}  // namespace fastokd
