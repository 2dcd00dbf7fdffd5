// FFSD's attention: one pass over the map sums squares over channels; the rest works on a row of pixels.
//
// With u = a / n, n = max(||a||, eps), and g a gradient by u, the gradient by a is
// (g - u (u . g)) / n, without its second term where ||a|| < eps: there n is constant.
#include "attention_kernel.h"

#include "vec.h"

namespace fastokd {
namespace {

constexpr float kEps = 1e-12f;

// Prefetch distance in bytes. Sixteen pixels are read by as many strided instructions, which the
// hardware prefetchers don't follow: without it a map in memory takes up to twice the time.
constexpr int64_t kAhead = 4096;

#if defined(__AVX512F__)
#define FASTOKD_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define FASTOKD_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif defined(__AVX2__)
#define FASTOKD_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define FASTOKD_ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define FASTOKD_EVEN 0, 2, 4, 6
#define FASTOKD_ODD 1, 3, 5, 7
#endif

// The sums of neighbouring lanes, a's and then b's.
inline Vec pair_sums(Vec a, Vec b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, FASTOKD_EVEN) + __builtin_shufflevector(a, b, FASTOKD_ODD);
#else
  return __builtin_shuffle(a, b, VecInt{FASTOKD_EVEN}) +
         __builtin_shuffle(a, b, VecInt{FASTOKD_ODD});
#endif
}

// Lane i of the result is the sum of v[i]'s lanes.
inline Vec sums(Vec (&v)[kLanes]) {
#pragma GCC unroll 4
  for (int left = kLanes / 2; left > 0; left /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < left; ++i) v[i] = pair_sums(v[2 * i], v[2 * i + 1]);
  }
  return v[0];
}

// The last kLanes of n elements, those before a multiple of kLanes as zeros; n >= kLanes.
template <class T>
inline Vec load_end(const T* p, int64_t n) {
  const int64_t seen = (n / kLanes) * kLanes - (n - kLanes);  // lanes already taken
  VecInt lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return select(lane >= static_cast<int32_t>(seen), load(p + n - kLanes), Vec{});
}

template <class T>
inline Vec squares(const T* p, int64_t n) {
  Vec total{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    __builtin_prefetch(reinterpret_cast<const char*>(p + i) + kAhead);
    const Vec x = load(p + i);
    total += x * x;
  }
  if (i < n) {
    const Vec x = n > kLanes ? load_end(p, n) : load_part(p, static_cast<int>(n), 0.0f);
    total += x * x;
  }
  return total;
}

template <class T>
void energy_last(const MapSample& x, float* a) {
  const T* p = static_cast<const T*>(x.data);
  const Vec channels = splat(static_cast<float>(x.channels));
  int64_t pixel = 0;
  for (; pixel + kLanes <= x.pixels; pixel += kLanes, p += kLanes * x.stride_p) {
    Vec v[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) v[i] = squares(p + i * x.stride_p, x.channels);
    store(a + pixel, sums(v) / channels);
  }
  if (pixel < x.pixels) {
    Vec v[kLanes] = {};
    for (int64_t i = 0; i < x.pixels - pixel; ++i) v[i] = squares(p + i * x.stride_p, x.channels);
    store(a + pixel, sums(v) / channels);
  }
}

template <class T>
void energy_first(const MapSample& x, float* a) {
  const Vec channels = splat(static_cast<float>(x.channels));
  for (int64_t c = 0; c < x.channels; ++c) {
    const T* p = static_cast<const T*>(x.data) + c * x.stride_c;
    const auto add = [&](int64_t i, Vec v) { store(a + i, load(a + i) + v * v); };
    int64_t i = 0;
    for (; i + kLanes <= x.pixels; i += kLanes) add(i, load(p + i));
    if (i < x.pixels) add(i, load_part(p + i, static_cast<int>(x.pixels - i), 0.0f));
  }
  for (int64_t i = 0; i < x.pixels; i += kLanes) store(a + i, load(a + i) / channels);
}

// out_i = f(x_i) for n neighbouring elements; out must not overlap x.
template <class T, class F>
inline void each(const T* x, T* out, int64_t n, F f) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, f(load(x + i), i));
  if (i == n) return;
  if (n > kLanes) {  // the last whole vector once more: it overlaps, and computes the same
    store(out + n - kLanes, f(load(x + n - kLanes), n - kLanes));
  } else {
    const int left = static_cast<int>(n);
    store_part(out, f(load_part(x, left, 0.0f), 0), left);
  }
}

template <class T, bool kAdd>
void apply(const MapSample& x, const float* s, float factor, const MapSample& out) {
  const T* const from = static_cast<const T*>(x.data);
  T* const to = static_cast<T*>(out.data);
  if (x.stride_c == 1 && out.stride_c == 1) {
    for (int64_t p = 0; p < x.pixels; ++p) {
      const Vec v = splat(s[p] * factor);
      each(from + p * x.stride_p, to + p * out.stride_p, x.channels,
           [&](Vec e, int64_t) { return kAdd ? e + v : e * v; });
    }
  } else {
    const Vec by = splat(factor);
    for (int64_t c = 0; c < x.channels; ++c) {
      each(from + c * x.stride_c, to + c * out.stride_c, x.pixels, [&](Vec e, int64_t i) {
        const int64_t left = x.pixels - i;
        const Vec v = by * (left >= kLanes ? load(s + i)
                                           : load_part(s + i, static_cast<int>(left), 0.0f));
        return kAdd ? e + v : e * v;
      });
    }
  }
}

template <bool kAdd>
void apply_typed(const MapSample& x, const float* s, float factor, const MapSample& out) {
  switch (x.type) {
    case Type::kFloat: return apply<float, kAdd>(x, s, factor, out);
    case Type::kBFloat16: return apply<BFloat16, kAdd>(x, s, factor, out);
    case Type::kHalf: return apply<Half, kAdd>(x, s, factor, out);
  }
}

inline float dot(const float* a, const float* b, int64_t pixels) {
  Vec total{};
  for (int64_t i = 0; i < pixels; i += kLanes) total += load(a + i) * load(b + i);
  return sum(total);
}

// How many lanes of a comparison hold.
inline int count(VecInt mask) {
#if defined(__AVX512F__)
  return __builtin_popcount(_mm512_movepi32_mask((__m512i)mask));
#elif defined(__AVX2__)
  return __builtin_popcount(_mm256_movemask_ps((__m256)mask));
#else
  int total = 0;
  for (int i = 0; i < kLanes; ++i) total -= mask[i];
  return total;
#endif
}

// NaN propagates.
inline float divisor(float r) { return r < kEps ? kEps : r; }

}  // namespace

void FASTOKD_KERNEL(attention_energy)(const MapSample& x, float* a) {
  for (int64_t i = 0; i < x.pixels; i += kRowPad) {
    for (int64_t j = i; j < i + kRowPad; ++j) a[j] = 0.0f;
  }
  const bool last = x.stride_c == 1;
  switch (x.type) {
    case Type::kFloat: return last ? energy_last<float>(x, a) : energy_first<float>(x, a);
    case Type::kBFloat16: return last ? energy_last<BFloat16>(x, a) : energy_first<BFloat16>(x, a);
    case Type::kHalf: return last ? energy_last<Half>(x, a) : energy_first<Half>(x, a);
  }
}

float FASTOKD_KERNEL(attention_normalise)(float* a, int64_t pixels) {
  const float r = __builtin_sqrtf(dot(a, a, pixels));
  const Vec n = splat(divisor(r));
  for (int64_t i = 0; i < pixels; i += kLanes) store(a + i, load(a + i) / n);
  return r;
}

// u is not negative, so its bit patterns are ordered as its values are: the threshold is found two
// bits at a time, counting the entries below three candidates. If one u is NaN,
// all are.
void FASTOKD_KERNEL(attention_target)(const float* u, float r, int64_t pixels, float* target) {
  const int64_t padded = (pixels + kLanes - 1) / kLanes * kLanes;
  const int64_t wanted = pixels / 3 + padded - pixels;  // the padding's zeros are below all
  int32_t found = 0;
  for (int bit = 28; bit >= 0; bit -= 2) {  // u is at most 1 and a rounding
    int64_t below[3] = {};
    for (int64_t i = 0; i < pixels; i += kLanes) {
      const VecInt pattern = as_int(load(u + i));
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) below[j] += count(pattern < (found | ((j + 1) << bit)));
    }
    const int digit = (below[0] < wanted) + (below[1] < wanted) + (below[2] < wanted);
    found |= digit << bit;
  }
  const Vec half = splat(r / 2);
  for (int64_t i = 0; i < pixels; i += kLanes) {
    const Vec v = load(u + i);
    const VecInt sign = (as_int(v) < found) - (as_int(v) > found);
    store(target + i, (half - v) * __builtin_convertvector(sign, Vec) + half);
  }
  for (int64_t i = pixels; i < padded; ++i) target[i] = 0.0f;
}

float FASTOKD_KERNEL(attention_difference)(const float* u, const float* v, int64_t pixels,
                                           float scale, float* g) {
  Vec total{};
  const Vec by = splat(scale);
  for (int64_t i = 0; i < pixels; i += kLanes) {
    const Vec d = load(u + i) - load(v + i);
    total += d * d;
    store(g + i, d * by);
  }
  return sum(total);
}

void FASTOKD_KERNEL(attention_gradient)(const float* u, float r, int64_t pixels,
                                        int64_t channels, float* g) {
  const Vec along = splat(r < kEps ? 0.0f : dot(u, g, pixels));
  const Vec n = splat(divisor(r)), per_channel = splat(2.0f / static_cast<float>(channels));
  for (int64_t i = 0; i < pixels; i += kLanes) {
    store(g + i, (load(g + i) - load(u + i) * along) / n * per_channel);
  }
}

void FASTOKD_KERNEL(attention_scale)(const MapSample& x, const float* s, float factor,
                                     const MapSample& out) {
  apply_typed<false>(x, s, factor, out);
}

void FASTOKD_KERNEL(attention_shift)(const MapSample& x, const float* s, float factor,
                                     const MapSample& out) {
  apply_typed<true>(x, s, factor, out);
}

}  // namespace fastokd
