// y[h][w] = max over i, j of x[h s + i - 1][w s + j - 1]; the first of equal ones, and NaN, as in torch.
// The gradient is gathered, not scattered: an input pixel sums over the (at most nine) outputs whose
// maximum it is, so that no two threads write to one pixel, and it is rounded once.
#include "max_pool_kernel.h"

#include "vec.h"

namespace fastokd {
namespace {

// GCC converts vectors of bytes one element at a time: on AVX intrinsics are used.
inline VecInt load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return (VecInt)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (VecInt)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  VecInt x;
  for (int i = 0; i < kLanes; ++i) x[i] = p[i];
  return x;
#endif
}

inline void store_bytes(uint8_t* p, VecInt x) {
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)x));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(x[i]);
#endif
}

// The taps [first, last) inside the map of a window that starts at `from`.
struct Taps {
  int64_t first, last;
  Taps(int64_t from, int64_t size)
      : first(from < 0 ? -from : 0), last(size - from < 3 ? size - from : 3) {}
  bool all() const { return first == 0 && last == 3; }
};

// All channels of one output pixel. kAll: no tap is outside the map, and the loops are unrolled.
template <bool kAll, class E>
inline void pool_place(const PoolShape& s, const E* corner, Taps rows, Taps places, E* y,
                               uint8_t* taps) {
  const int64_t top = kAll ? 0 : rows.first, bottom = kAll ? 3 : rows.last;
  const int64_t left = kAll ? 0 : places.first, right = kAll ? 3 : places.last;
  for (int64_t c = 0; c < s.C; c += kLanes) {
    Vec best = splat(-kInfinity);
    VecInt tap = VecInt{} + static_cast<int32_t>(3 * top + left);
#pragma GCC unroll 3
    for (int64_t i = top; i < bottom; ++i) {
#pragma GCC unroll 3
      for (int64_t j = left; j < right; ++j) {
        const Vec x = load(corner + (i * s.W + j) * s.C + c);
        const VecInt more = (x > best) | (x != x);
        best = select(more, x, best);
        tap = more ? VecInt{} + static_cast<int32_t>(3 * i + j) : tap;
      }
    }
    store(y + c, best);
    store_bytes(taps + c, tap);
  }
}

template <class E>
void pool_row(const PoolShape& s, const E* image, int64_t h, E* y, uint8_t* taps) {
  const int64_t top = h * s.stride - 1;
  const Taps rows(top, s.H);
  for (int64_t w = 0; w < s.OW; ++w, y += s.C, taps += s.C) {
    const int64_t left = w * s.stride - 1;
    const Taps places(left, s.W);
    const E* const corner = image + (top * s.W + left) * s.C;
    if (rows.all() && places.all()) {
      pool_place<true>(s, corner, rows, places, y, taps);
    } else {
      pool_place<false>(s, corner, rows, places, y, taps);
    }
  }
}

// The outputs whose window contains input p, from the last to the first; p is their tap `tap`, `tap` +
// stride and so on.
struct Over {
  int64_t last, tap, count;
  Over(int64_t p, int64_t stride, int64_t size) {
    last = (p + 1) / stride;
    tap = p + 1 - last * stride;
    for (; last >= size; --last) tap += stride;
    count = 0;
    while (last - count >= 0 && tap + count * stride < 3) ++count;
  }
};

// All channels of one input pixel, which R by P outputs contain: from the last row and column on,
// s.stride taps apart.
template <int R, int P, class E>
void gradient_place(const PoolShape& s, const E* grad_y, const uint8_t* taps, int64_t tap,
                    E* grad_x) {
  for (int64_t c = 0; c < s.C; c += kLanes) {
    Vec sum = {};
#pragma GCC unroll 3
    for (int64_t i = 0; i < R; ++i) {
#pragma GCC unroll 3
      for (int64_t j = 0; j < P; ++j) {
        const int64_t at = c - (i * s.OW + j) * s.C;
        const VecInt mine = VecInt{} + static_cast<int32_t>(tap + (3 * i + j) * s.stride);
        const VecInt came = load_bytes(taps + at) == mine;
        sum = sum + select(came, load(grad_y + at), Vec{});
      }
    }
    store(grad_x + c, sum);
  }
}

template <class E>
void gradient_row(const PoolShape& s, const E* grad_y, const uint8_t* taps, int64_t h, E* grad_x) {
  static constexpr decltype(&gradient_place<1, 1, E>) kPlaces[3][3] = {
      {gradient_place<1, 1, E>, gradient_place<1, 2, E>, gradient_place<1, 3, E>},
      {gradient_place<2, 1, E>, gradient_place<2, 2, E>, gradient_place<2, 3, E>},
      {gradient_place<3, 1, E>, gradient_place<3, 2, E>, gradient_place<3, 3, E>},
  };
  const Over rows(h, s.stride, s.OH);
  for (int64_t w = 0; w < s.W; ++w, grad_x += s.C) {
    const Over places(w, s.stride, s.OW);
    const int64_t at = (rows.last * s.OW + places.last) * s.C;
    kPlaces[rows.count - 1][places.count - 1](s, grad_y + at, taps + at,
                                              3 * rows.tap + places.tap, grad_x);
  }
}

template <class E>
void pool_rows(const PoolShape& s, const void* x, void* y, uint8_t* taps, int64_t begin,
               int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t at = row * s.OW * s.C;
    pool_row(s, static_cast<const E*>(x) + row / s.OH * s.H * s.W * s.C, row % s.OH,
             static_cast<E*>(y) + at, taps + at);
  }
}

template <class E>
void gradient_rows(const PoolShape& s, const void* grad_y, const uint8_t* taps, void* grad_x,
                   int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / s.H * s.OH * s.OW * s.C;
    gradient_row(s, static_cast<const E*>(grad_y) + image, taps + image, row % s.H,
                 static_cast<E*>(grad_x) + row * s.W * s.C);
  }
}

}  // namespace

void FASTOKD_KERNEL(max_pool)(Type type, const PoolShape& s, const void* x, void* y, uint8_t* taps,
                              int64_t begin, int64_t end) {
  const auto rows = type == Type::kFloat      ? pool_rows<float>
                    : type == Type::kBFloat16 ? pool_rows<BFloat16>
                                              : pool_rows<Half>;
  rows(s, x, y, taps, begin, end);
}

void FASTOKD_KERNEL(max_pool_gradient)(Type type, const PoolShape& s, const void* grad_y,
                                       const uint8_t* taps, void* grad_x, int64_t begin,
                                       int64_t end) {
  const auto rows = type == Type::kFloat      ? gradient_rows<float>
                    : type == Type::kBFloat16 ? gradient_rows<BFloat16>
                                              : gradient_rows<Half>;
  rows(s, grad_y, taps, grad_x, begin, end);
}

}  // namespace fastokd
