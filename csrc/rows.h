// Passes over rows of classes for the kernels' units. Scratch rows are aligned and of length
// `padded`, so that passes over them have no remainder; rows of tensors are neither.
#pragma once

#include "vec.h"

namespace fastokd {
namespace {

// Fills rows after the last class: finite, so that 0 times it is 0, and its exponential is 0.
constexpr float kPadding = -1e37f;

inline int64_t padded(int64_t classes) { return (classes + 15) / 16 * 16; }

// Calls body(i, get, put) for each vector of a row: get(p) reads it at p + i, lanes behind the
// last class being `fill`, and put(p, x) writes those before it.
template <typename Body>
inline void each_vector(int64_t classes, float fill, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= classes; i += kLanes) {
    body(
        i, [i](const auto* p) { return load(p + i); }, [i](auto* p, Vec x) { store(p + i, x); });
  }
  if (i == classes) return;
  const int count = int(classes - i);
  body(
      i, [=](const auto* p) { return load_part(p + i, count, fill); },
      [=](auto* p, Vec x) { store_part(p + i, x, count); });
}

// A sum over many vectors, in two levels: its error doesn't grow with a row's length.
struct Total {
  Vec low{}, high{};
  int count = 0;

  void add(Vec x) {
    low += x;
    if (++count == 32) high += low, low = Vec{}, count = 0;
  }
  float sum() const { return fastokd::sum(high + low); }
};

// Ignores NaN: what is computed from the row is NaN anyway.
template <typename T>
inline float row_max(const T* row, int64_t classes) {
  Vec best = splat(-kInfinity);
  each_vector(classes, -kInfinity,
              [&](int64_t, auto get, auto) { best = max(get(row), best); });
  return max(best);
}

inline float row_sum(const float* row, int64_t classes) {
  Total total;
  each_vector(classes, 0.0f, [&](int64_t, auto get, auto) { total.add(get(row)); });
  return total.sum();
}

inline float row_dot(const float* a, const float* b, int64_t classes) {
  Total total;
  each_vector(classes, 0.0f, [&](int64_t, auto get, auto) { total.add(get(a) * get(b)); });
  return total.sum();
}

// Calls body(i, x) for each vector of a padded row, x that of a tensor's row less `shift`.
template <typename T, typename Body>
inline void each_shifted(const T* from, float shift, int64_t classes, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= classes; i += kLanes) body(i, load(from + i) - shift);
  for (; i < padded(classes); i += kLanes) {
    const int count = classes > i ? int(classes - i) : 0;
    const Vec rest = count ? load_part(from + i, count, 0.0f) - shift : Vec{};
    body(i, select(lane_below(count), rest, splat(kPadding)));
  }
}

// to = base + sum over k of coefficients[k] * rows[k], K rows at once; no base: 0. Where asked for,
// `top` is the largest element, and dots[k] the dot product of rows[k] and `with`.
template <int K, typename T>
inline void row_mix_few(T* to, const float* base, const float* const* rows,
                        const float* coefficients, int64_t classes, float* top, const float* with,
                        float* dots) {
  Vec best = splat(-kInfinity), products[4] = {};
  each_vector(classes, 0.0f, [&](int64_t, auto get, auto put) {
    Vec total = base ? get(base) : Vec{};
    const Vec other = with ? get(with) : Vec{};
    for (int k = 0; k < K; ++k) {
      const Vec row = get(rows[k]);
      total += row * coefficients[k];
      if (with) products[k] += row * other;
    }
    if (top) best = max(total, best);
    put(to, total);
  });
  if (top) *top = max(best);
  if (with) sum4(dots, products[0], products[1], products[2], products[3]);
}
// `spare` is a scratch row, for the intermediate sums of more than four rows; `dots` has room for
// a multiple of four.
template <typename T>
inline void row_mix(T* to, const float* base, const float* const* rows, const float* coefficients,
                    int count, int64_t classes, float* spare, float* top = nullptr,
                    const float* with = nullptr, float* dots = nullptr) {
  for (; count > 4; count -= 4, rows += 4, coefficients += 4, base = spare) {
    row_mix_few<4>(spare, base, rows, coefficients, classes, nullptr, with, dots);
    if (with) dots += 4;
  }
  switch (count) {
    case 0: return row_mix_few<0>(to, base, rows, coefficients, classes, top, with, dots);
    case 1: return row_mix_few<1>(to, base, rows, coefficients, classes, top, with, dots);
    case 2: return row_mix_few<2>(to, base, rows, coefficients, classes, top, with, dots);
    case 3: return row_mix_few<3>(to, base, rows, coefficients, classes, top, with, dots);
    default: return row_mix_few<4>(to, base, rows, coefficients, classes, top, with, dots);
  }
}

// Logs of up to 16 numbers; both arrays have room for 16.
inline void logs(float* to, const float* from, int count) {
  for (int i = 0; i < count; i += kLanes) store(to + i, log(load(from + i)));
}

}  // namespace
}  // namespace fastokd
