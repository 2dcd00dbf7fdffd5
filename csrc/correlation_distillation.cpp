// The dispatcher's side of DIST: threads take rows of probabilities, then stretches of columns, then the
// rows of the gradient.
#include "correlation_distillation_kernel.h"

#include "targets.h"

namespace fastokd {
namespace {

constexpr int64_t kColumns = 16;

std::vector<float> probabilities(const Rows& rows, int64_t S, int64_t B, int64_t C, int64_t width,
                                 float inverse) {
  std::vector<float> y_SBC(S * B * width);
  parallel(S * B, std::max<int64_t>(1, 4096 / C), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      FASTOKD_DISPATCH(softmax_row)(C, rows.type, rows(n / B, n % B), inverse, &y_SBC[n * width]);
    }
  });
  return y_SBC;
}

std::tuple<Tensor, Tensor> correlation_distillation(const Tensor& logits, const Tensor& target,
                                                    double beta, double gamma, double temperature,
                                                    bool ask) {
  const Rows z = rows_of(logits, logits, "logits_SBC"), t = rows_of(target, logits, "target_SBC");
  const int64_t S = logits.size(0), B = logits.size(1), C = logits.size(2);
  TORCH_CHECK(C >= 1 && temperature > 0.0, "there must be a class, and T above 0");
  const Gradient gradient(logits, ask);
  if (B == 0) return {means({}, S, 0), gradient.tensor};
  const int64_t width = (C + 15) / 16 * 16, grain = std::max<int64_t>(1, 4096 / C);
  const float inverse = float(1.0 / temperature);
  const std::vector<float> y_SBC = probabilities(z, S, B, C, width, inverse);
  const std::vector<float> u_TBC = probabilities(t, target.size(0), B, C, width, inverse);
  const int64_t next = target.size(0) == 1 ? 0 : B * width;
  std::vector<Correlation> row_SB(S * B);
  parallel(S * B, grain, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      row_SB[n] = FASTOKD_DISPATCH(correlate_row)(C, &y_SBC[n * width],
                                                  &u_TBC[n / B * next + n % B * width]);
    }
  });
  const int64_t blocks = width / kColumns;
  std::vector<float> saved_S4C(S * 4 * width);
  std::vector<double> part_SK(S * blocks);
  parallel(S * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t s = n / blocks, first = n % blocks * kColumns;
      part_SK[n] = FASTOKD_DISPATCH(correlate_columns)(C, B, &y_SBC[s * B * width],
                                                       &u_TBC[s * next], first, first + kColumns,
                                                       &saved_S4C[s * 4 * width]);
    }
  });
  if (ask) {
    const CorrelationOptions options = {C, float(-temperature * beta / double(B)),
                                        float(-temperature * gamma / double(C))};
    parallel(S * B, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(width);
      for (int64_t n = begin; n < end; ++n) {
        const int64_t s = n / B;
        FASTOKD_DISPATCH(correlation_gradient)(options, &y_SBC[n * width],
                                               &u_TBC[s * next + n % B * width], row_SB[n],
                                               &saved_S4C[s * 4 * width], scratch.data(),
                                               gradient(n));
      }
    });
  }
  Tensor loss_S = new_float({S});
  for (int64_t s = 0; s < S; ++s) {
    double rows = 0.0, columns = 0.0;
    for (int64_t b = 0; b < B; ++b) rows += row_SB[s * B + b].rho;
    for (int64_t k = 0; k < blocks; ++k) columns += part_SK[s * blocks + k];
    const double inter = 1.0 - rows / double(B), intra = 1.0 - columns / double(C);
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
