// Passes over rows of classes for the kernels' units. Scratch rows are aligned, and as long as
// `padded` says, so that passes over them have no rest; rows of tensors are neither.
#pragma once

#include "vec.h"

namespace fastokd {
namespace {

// Stands behind the last class: finite, so that 0 times it is 0, and e to its power is 0.
constexpr float kPadding = -1e30f;

inline int64_t padded(int64_t classes) { return (classes + 15) / 16 * 16; }

// Calls body(i, load, store) for each vector of a row; load(p) reads p + i, its lanes behind the
// last class being `fill`, and store(p, x) writes the lanes before it.
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

// NaNs are passed over: what is computed from them is NaN anyway.
template <typename T>
inline float row_max(const T* row, int64_t classes) {
  Vec best = splat(-kInfinity);
  each_vector(classes, -kInfinity,
              [&](int64_t, auto get, auto) { best = max(get(row), best); });
  return max(best);
}

inline float row_sum(const float* row, int64_t classes) {
  Vec total{};
  each_vector(classes, 0.0f, [&](int64_t, auto get, auto) { total += get(row); });
  return sum(total);
}

inline float row_dot(const float* a, const float* b, int64_t classes) {
  Vec total[2] = {};
  int turn = 0;
  each_vector(classes, 0.0f, [&](int64_t, auto get, auto) {
    total[turn] += get(a) * get(b);
    turn ^= 1;
  });
  return sum(total[0] + total[1]);
}

// Copies a tensor's row less `shift` to scratch, padded.
template <typename T>
inline void row_shift(float* to, const T* from, float shift, int64_t classes) {
  int64_t i = 0;
  for (; i + kLanes <= classes; i += kLanes) store(to + i, load(from + i) - shift);
  for (; i < padded(classes); i += kLanes) {
    const int count = classes > i ? int(classes - i) : 0;
    const Vec rest = count ? load_part(from + i, count, 0.0f) - shift : Vec{};
    store(to + i, select(lane_below(count), rest, splat(kPadding)));
  }
}

// to = base + sum over k of coefficients[k] * rows[k], K rows at once; no base: 0.
template <int K, typename T>
inline void row_mix_few(T* to, const float* base, const float* const* rows,
                        const float* coefficients, int64_t classes) {
  each_vector(classes, 0.0f, [=](int64_t, auto get, auto put) {
    Vec total = base ? get(base) : Vec{};
    for (int k = 0; k < K; ++k) total += get(rows[k]) * coefficients[k];
    put(to, total);
  });
}
// `scratch` holds the intermediate sums of more than four rows.
template <typename T>
inline void row_mix(T* to, const float* base, const float* const* rows, const float* coefficients,
                    int count, int64_t classes, float* scratch) {
  for (; count > 4; count -= 4, rows += 4, coefficients += 4, base = scratch) {
    row_mix_few<4>(scratch, base, rows, coefficients, classes);
  }
  switch (count) {
    case 0: return row_mix_few<0>(to, base, rows, coefficients, classes);
    case 1: return row_mix_few<1>(to, base, rows, coefficients, classes);
    case 2: return row_mix_few<2>(to, base, rows, coefficients, classes);
    case 3: return row_mix_few<3>(to, base, rows, coefficients, classes);
    default: return row_mix_few<4>(to, base, rows, coefficients, classes);
  }
}

}  // namespace
}  // namespace fastokd
