// The dispatcher's side of DIST: threads take rows of logits, then columns of their probabilities, then the
// rows of the gradient.
#include "correlation_distillation_kernel.h"

#include "targets.h"

namespace fastokd {
namespace {

constexpr int64_t kColumns = 16;  // of one block: a cache line

std::tuple<Tensor, Tensor> correlation_distillation(const Tensor& logits, const Tensor& target,
                                                    double beta, double gamma, double temperature,
                                                    bool ask) {
  const Rows z = rows_of(logits, logits, "logits_SBC"), t = rows_of(target, logits, "target_SBC");
  const int64_t S = logits.size(0), B = logits.size(1), C = logits.size(2);
  TORCH_CHECK(C >= 1 && temperature > 0.0, "there must be a class, and T above 0");
  const Gradient gradient(logits, ask);
  if (B == 0) return {means({}, S, 0), gradient.tensor};
  const int64_t width = (C + 15) / 16 * 16, grain = std::max<int64_t>(1, 4096 / C);
  const int64_t targets = target.size(0), next = targets == 1 ? 0 : B * width;
  const float inverse = float(1.0 / temperature);
  // Probabilities of the targets and of the students, in rows of `width`.
  const Tensor rows = new_float({(targets + S) * B, width});
  float* const u_TBC = rows.mutable_data_ptr<float>();
  float* const y_SBC = u_TBC + targets * B * width;
  parallel(targets * B, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      FASTOKD_DISPATCH(softmax_row)(C, t.type, t(n / B, n % B), inverse, u_TBC + n * width);
    }
  });
  std::vector<Correlation> row_SB(S * B);
  parallel(S * B, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t s = n / B, b = n % B;
      float* const y = y_SBC + n * width;
      FASTOKD_DISPATCH(softmax_row)(C, z.type, z(s, b), inverse, y);
      row_SB[n] = FASTOKD_DISPATCH(correlate_row)(C, y, u_TBC + s * next + b * width);
    }
  });
  const int64_t blocks = width / kColumns;
  const Tensor saved = new_float({S, 5, width});
  float* const saved_S5C = saved.mutable_data_ptr<float>();
  std::vector<double> rho_SK(S * blocks);
  parallel(S * blocks, std::max<int64_t>(1, 256 / B), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t s = n / blocks, first = n % blocks * kColumns;
      rho_SK[n] = FASTOKD_DISPATCH(correlate_columns)(C, B, y_SBC + s * B * width, u_TBC + s * next,
                                                      first, first + kColumns,
                                                      saved_S5C + s * 5 * width);
    }
  });
  if (ask) {
    const CorrelationOptions options = {C, float(-temperature * beta / double(B)),
                                        float(-temperature * gamma / double(C))};
    parallel(S * B, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(width);
      for (int64_t n = begin; n < end; ++n) {
        const int64_t s = n / B;
        FASTOKD_DISPATCH(correlation_gradient)(options, y_SBC + n * width,
                                               u_TBC + s * next + n % B * width, row_SB[n],
                                               saved_S5C + s * 5 * width, scratch.data(),
                                               gradient(n));
      }
    });
  }
  Tensor loss_S = new_float({S});
  for (int64_t s = 0; s < S; ++s) {
    double in_rows = 0.0, in_columns = 0.0;
    for (int64_t b = 0; b < B; ++b) in_rows += row_SB[s * B + b].rho;
    for (int64_t k = 0; k < blocks; ++k) in_columns += rho_SK[s * blocks + k];
    const double inter = 1.0 - in_rows / double(B), intra = 1.0 - in_columns / double(C);
    loss_S.mutable_data_ptr<float>()[s] =
        float(temperature * temperature * (beta * inter + gamma * intra));
  }
  return {loss_S, gradient.tensor};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastokd, CPU, m) {
  m.impl("correlation_distillation", correlation_distillation);
}

}  // namespace fastokd
