// Rows of logits for the kernels of divergences from a target, of any element type.
#pragma once

#include "rows.h"

namespace fastokd {
namespace {

template <class T>
inline void scale_typed(float* to, const void* from, int64_t classes, float by) {
  each_shifted(static_cast<const T*>(from), 0.0f, classes,
               [&](int64_t i, Vec x) { store(to + i, x * by); });
  for (int64_t i = classes; i < padded(classes); ++i) to[i] = kPadding;
}

// to = from * by; kPadding after the last class.
inline void scale_row(float* to, Type type, const void* from, int64_t classes, float by) {
  switch (type) {
    case Type::kFloat: return scale_typed<float>(to, from, classes, by);
    case Type::kBFloat16: return scale_typed<BFloat16>(to, from, classes, by);
    case Type::kHalf: return scale_typed<Half>(to, from, classes, by);
  }
}

// A gradient's row from a scratch row.
inline void write_row(float* to, const float* from, int64_t classes) {
  each_vector(classes, 0.0f, [&](int64_t, auto get, auto put) { put(to, get(from)); });
}

}  // namespace
}  // namespace fastokd
