// What the dispatcher's sides of the divergences from a target share: their rows and results.
#pragma once

#include <vector>

#include "op.h"

namespace fastokd {

// Rows of [S, B, C], or [1, B, C] of one for all students.
struct Rows {
  const char* data;
  int64_t student, sample;  // bytes
  Type type;
  const void* operator()(int64_t s, int64_t b) const { return data + s * student + b * sample; }
};

inline Rows rows_of(const Tensor& x, const Tensor& logits, const char* name) {
  const Type type = type_of(x, name);
  TORCH_CHECK(logits.dim() == 3 && x.dim() == 3 && x.size(1) == logits.size(1) &&
                  x.size(2) == logits.size(2) && (x.size(0) == 1 || x.size(0) == logits.size(0)),
              name, " must be [students or 1, batch, classes], not ", x.sizes());
  TORCH_CHECK(x.size(2) < 2 || x.stride(2) == 1, name, "' classes must be neighbours");
  const int64_t size = x.element_size();
  return {static_cast<const char*>(x.const_data_ptr()), x.size(0) == 1 ? 0 : x.stride(0) * size,
          x.stride(1) * size, type};
}

// Where the gradient of the logits goes: dense rows of fp32, which the backward rounds once.
struct Gradient {
  Tensor tensor;
  float* data = nullptr;
  int64_t classes;
  Gradient(const Tensor& logits, bool ask) : classes(logits.size(2)) {
    tensor = ask ? new_float(logits.sizes()) : new_float({0});
    if (ask) data = tensor.mutable_data_ptr<float>();
  }
  float* operator()(int64_t n) const { return data ? data + n * classes : nullptr; }
};

// The mean of each student's samples, added in their order; 0 of none.
inline Tensor means(const std::vector<double>& loss_SB, int64_t S, int64_t B) {
  Tensor loss_S = new_float({S});
  float* const to = loss_S.mutable_data_ptr<float>();
  for (int64_t s = 0; s < S; ++s) {
    double total = 0.0;
    for (int64_t b = 0; b < B; ++b) total += loss_SB[s * B + b];
    to[s] = static_cast<float>(total / static_cast<double>(std::max<int64_t>(B, 1)));
  }
  return loss_S;
}

}  // namespace fastokd
