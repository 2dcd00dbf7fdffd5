// The dispatcher's side of DKD: threads take samples of students.
#include "decoupled_distillation_kernel.h"

#include <cmath>

#include "targets.h"

namespace fastokd {
namespace {

std::tuple<Tensor, Tensor> decoupled_distillation(const Tensor& logits, const Tensor& target,
                                                  const Tensor& labels, double alpha, double beta,
                                                  double temperature, bool ask) {
  const Rows z = rows_of(logits, logits, "logits_SBC"), t = rows_of(target, logits, "target_SBC");
  const int64_t S = logits.size(0), B = logits.size(1), C = logits.size(2);
  TORCH_CHECK(C >= 2 && temperature > 0.0, "there must be 2 classes, and T above 0");
  TORCH_CHECK(labels.device().is_cpu() && labels.dim() == 1 && labels.size(0) == B &&
                  at::isIntegralType(labels.scalar_type(), false),
              "labels_B must be integers [", B, "] on the CPU");
  const Tensor ids = labels.to(at::kLong).contiguous();
  const int64_t* const id = ids.const_data_ptr<int64_t>();
  const Gradient gradient(logits, ask);
  const DecoupledOptions options = {C,
                                    float(alpha),
                                    float(beta),
                                    float(temperature),
                                    float(1.0 / temperature),
                                    float(temperature / double(std::max<int64_t>(B, 1))),
                                    z.type,
                                    t.type};
  std::vector<double> loss_SB(S * B);
  parallel(S * B, std::max<int64_t>(1, 4096 / C), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(2 * (C + 16));
    for (int64_t n = begin; n < end; ++n) {
      const int64_t s = n / B, b = n % B;
      const bool valid = id[b] >= 0 && id[b] < C;
      DecoupledOptions o = options;
      if (!valid) o.alpha = o.beta = std::nanf("");
      loss_SB[n] = FASTOKD_DISPATCH(decoupled_row)(o, z(s, b), t(s, b), valid ? id[b] : 0,
                                                   scratch.data(), gradient(n));
    }
  });
  return {means(loss_SB, S, B), gradient.tensor};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastokd, CPU, m) {
  m.impl("decoupled_distillation", decoupled_distillation);
}

}  // namespace fastokd
