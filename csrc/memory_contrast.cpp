// The dispatcher's side of MCL's similarities with rows of a memory: threads take stretches of samples'
// rows, whose gradients are added in their order, so that no result depends on the number of threads.
#include "memory_contrast_kernel.h"

#include "op.h"

namespace fastokd {
namespace {

constexpr int64_t kStretch = 512;  // rows

struct Sizes {
  Type type;
  int64_t S, B, K, N, D;
};

Sizes check(const Tensor& memory, const Tensor& index, int64_t S, int64_t B) {
  TORCH_CHECK(memory.dim() == 3 && memory.size(0) == S && memory.is_contiguous(),
              "memory_SND must be contiguous, [", S, ", images, width], not ", memory.sizes());
  TORCH_CHECK(index.device().is_cpu() && index.layout() == at::kStrided &&
                  index.scalar_type() == at::kLong && index.dim() == 2 && index.size(0) == B &&
                  index.is_contiguous(),
              "index_BK must be contiguous int64 [", B, ", rows] on the CPU, not ",
              index.scalar_type(), " of ", index.sizes());
  return {type_of(memory, "memory_SND"), S, B, index.size(1), memory.size(1), memory.size(2)};
}

// Calls body(i, first row, MemoryRows of student b's) for every stretch of every sample's rows and b.
template <class Body>
void each_stretch(const Sizes& s, const Tensor& memory, const Tensor& index, Body body) {
  const char* const from = static_cast<const char*>(memory.const_data_ptr());
  const int64_t each = s.N * s.D * memory.element_size();
  const int64_t* const indices = index.const_data_ptr<int64_t>();
  const int64_t stretches = (s.K + kStretch - 1) / kStretch;
  parallel(s.B * stretches, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t i = n / stretches, first = n % stretches * kStretch;
      const int64_t count = std::min(kStretch, s.K - first);
      const int64_t* const at = indices + i * s.K + first;
      for (int64_t k = 0; k < count; ++k) {
        TORCH_CHECK_INDEX(at[k] >= 0 && at[k] < s.N, "index_BK has ", at[k], ", but the memory has ",
                          s.N, " rows");
      }
      for (int64_t b = 0; b < s.S; ++b) {
        body(i, first, b, MemoryRows{s.type, from + b * each, at, count, s.D, s.S});
      }
    }
  });
}

Tensor memory_similarities(const Tensor& x, const Tensor& memory, const Tensor& index,
                           double scale) {
  TORCH_CHECK(x.dim() == 3, "x_SBD must be [students, batch, width], not ", x.sizes());
  const Sizes s = check(memory, index, x.size(0), x.size(1));
  const float* const anchors = kept(x, {s.S, s.B, s.D}, "x_SBD");
  Tensor A = new_float({s.S, s.S, s.B, s.K});
  float* const to = A.mutable_data_ptr<float>();
  each_stretch(s, memory, index, [&](int64_t i, int64_t first, int64_t b, const MemoryRows& rows) {
    FASTOKD_DISPATCH(memory_dots)(rows, anchors + i * s.D, s.B * s.D, static_cast<float>(scale),
                                  to + (b * s.B + i) * s.K + first, s.S * s.B * s.K);
  });
  return A;
}

Tensor memory_similarities_backward(const Tensor& grad, const Tensor& memory, const Tensor& index,
                                    double scale) {
  TORCH_CHECK(grad.dim() == 4, "grad_SSBK must be [students, students, batch, rows], not ",
              grad.sizes());
  const Sizes s = check(memory, index, grad.size(0), grad.size(2));
  const float* const from = kept(grad, {s.S, s.S, s.B, s.K}, "grad_SSBK");
  const int64_t stretches = (s.K + kStretch - 1) / kStretch, each = s.S * s.D;
  Tensor parts = new_float({s.B, stretches, s.S, s.D});
  Tensor dx = new_float({s.S, s.B, s.D});
  float* const sums = parts.mutable_data_ptr<float>();
  each_stretch(s, memory, index, [&](int64_t i, int64_t first, int64_t b, const MemoryRows& rows) {
    float* const to = sums + (i * stretches + first / kStretch) * each;
    if (b == 0) std::fill_n(to, each, 0.0f);
    FASTOKD_DISPATCH(memory_sums)(rows, from + (b * s.B + i) * s.K + first, s.S * s.B * s.K,
                                  static_cast<float>(scale), to);
  });
  float* const to = dx.mutable_data_ptr<float>();
  parallel(s.B, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t n = 0; n < each; ++n) {
        double total = 0.0;
        for (int64_t part = 0; part < stretches; ++part) {
          total += sums[(i * stretches + part) * each + n];
        }
        to[(n / s.D * s.B + i) * s.D + n % s.D] = static_cast<float>(total);
      }
    }
  });
  return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastokd, CPU, m) {
  m.impl("memory_similarities", memory_similarities);
  m.impl("memory_similarities_backward", memory_similarities_backward);
}

}  // namespace fastokd
