// Differences of these sums cancel: they are taken in fp32 lanes of at most kBlock / kLanes / 2
// terms, and the lanes are added up in double.
#include "feature_transfer_kernel.h"

#include "vec.h"

namespace fastokd {
namespace {

constexpr int64_t kBlock = 2048;

inline double sum_double(Vec x) {
  double total = 0.0;
  for (int i = 0; i < kLanes; ++i) total += static_cast<double>(x[i]);
  return total;
}

struct Sums {
  Vec xx, yy, xy, dd;
  void add(Vec x, Vec y) {
    xx += x * x;
    yy += y * y;
    xy += x * y;
    dd += (x - y) * (x - y);
  }
};

template <class T>
void sums_typed(const void* x_any, const void* y_any, int64_t n, double* sums) {
  const T* const x = static_cast<const T*>(x_any);
  const T* const y = static_cast<const T*>(y_any);
  sums[0] = sums[1] = sums[2] = sums[3] = 0.0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = start + kBlock < n ? start + kBlock : n;
    Sums even{}, odd{};
    int64_t i = start;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {
      even.add(load(x + i), load(y + i));
      odd.add(load(x + i + kLanes), load(y + i + kLanes));
    }
    for (; i < end; i += kLanes) {
      if (i + kLanes <= end) {
        even.add(load(x + i), load(y + i));
      } else {
        const int left = static_cast<int>(end - i);
        even.add(load_part(x + i, left, 0.0f), load_part(y + i, left, 0.0f));
      }
    }
    sums[0] += sum_double(even.xx + odd.xx);
    sums[1] += sum_double(even.yy + odd.yy);
    sums[2] += sum_double(even.xy + odd.xy);
    sums[3] += sum_double(even.dd + odd.dd);
  }
}

// (u - v - u along) / nx, with u - v taken as (x - y nx / ny) / nx: 0 where the maps are the same.
inline Vec gradient(Vec x, Vec y, Vec ratio, Vec along, Vec by) {
  return ((x - y * ratio) - x * along) * by;
}

template <class T>
void gradient_typed(const void* x_any, const void* y_any, int64_t n, FeatureSample s, float scale,
                    void* grad_x, void* grad_y) {
  const T* const x = static_cast<const T*>(x_any);
  const T* const y = static_cast<const T*>(y_any);
  T* const gx = static_cast<T*>(grad_x);
  T* const gy = static_cast<T*>(grad_y);
  const Vec to_x = splat(s.iy / s.ix), to_y = splat(s.ix / s.iy);
  const Vec along_x = splat(s.along_x), along_y = splat(s.along_y);
  const Vec by_x = splat(s.ix * s.ix * scale), by_y = splat(s.iy * s.iy * scale);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec p = load(x + i), q = load(y + i);
    if (gx) store(gx + i, gradient(p, q, to_x, along_x, by_x));
    if (gy) store(gy + i, gradient(q, p, to_y, along_y, by_y));
  }
  if (i < n) {
    const int left = static_cast<int>(n - i);
    const Vec p = load_part(x + i, left, 0.0f), q = load_part(y + i, left, 0.0f);
    if (gx) store_part(gx + i, gradient(p, q, to_x, along_x, by_x), left);
    if (gy) store_part(gy + i, gradient(q, p, to_y, along_y, by_y), left);
  }
}

}  // namespace

void FASTOKD_KERNEL(feature_sums)(Type type, const void* x, const void* y, int64_t n,
                                  double* sums) {
  switch (type) {
    case Type::kFloat: return sums_typed<float>(x, y, n, sums);
    case Type::kBFloat16: return sums_typed<BFloat16>(x, y, n, sums);
    case Type::kHalf: return sums_typed<Half>(x, y, n, sums);
  }
}

void FASTOKD_KERNEL(feature_gradient)(Type type, const void* x, const void* y, int64_t n,
                                      FeatureSample sample, float scale, void* grad_x,
                                      void* grad_y) {
  switch (type) {
    case Type::kFloat: return gradient_typed<float>(x, y, n, sample, scale, grad_x, grad_y);
    case Type::kBFloat16: return gradient_typed<BFloat16>(x, y, n, sample, scale, grad_x, grad_y);
    case Type::kHalf: return gradient_typed<Half>(x, y, n, sample, scale, grad_x, grad_y);
  }
}

}  // namespace fastokd
