// Rows of logits for the kernels of divergences from a target, of any element type.
#pragma once

#include "rows.h"

namespace fastokd {
namespace {

// Calls body with the row as an array of its element type.
template <class Body>
inline void typed(Type type, const void* row, Body body) {
  switch (type) {
    case Type::kFloat: return body(static_cast<const float*>(row));
    case Type::kBFloat16: return body(static_cast<const BFloat16*>(row));
    case Type::kHalf: return body(static_cast<const Half*>(row));
  }
}

// to = (from - top) * by, kPadding after the last class; `to` is a padded row.
template <class T>
inline void scale_row(float* to, const T* from, int64_t classes, float top, float by) {
  each_shifted(from, top, classes, [&](int64_t i, Vec shifted) { store(to + i, shifted * by); });
  for (int64_t i = classes; i < padded(classes); ++i) to[i] = kPadding;
}

// The lanes are added in double: a rounding of a whole sum counts more than one of a lane's.
inline double whole(const Total& total) {
  const Vec lanes = total.high + total.low;
  double sum = 0.0;
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

// A gradient's row from a scratch row.
inline void write_row(float* to, const float* from, int64_t classes) {
  each_vector(classes, 0.0f, [&](int64_t, auto get, auto put) { put(to, get(from)); });
}

}  // namespace
}  // namespace fastokd
