// With d the log odds of the label against the rest, p_y = 1 / (1 + e^-d). Of the label's logit and the
// rest's (r its softmax within the rest) the gradients are
//   alpha (q_y - p_y)   and   alpha (p_y - q_y) r_q + beta (r_q - r_p),   times T / B.
#include "decoupled_distillation_kernel.h"

#include "target_rows.h"

namespace fastokd {
namespace {

// log(1 + e^x).
inline double softplus(double x) {
  return x > 0.0 ? x + __builtin_log1p(__builtin_exp(-x)) : __builtin_log1p(__builtin_exp(x));
}

// The classes but the label: their largest logit, the sum of e^(logit - top), and the log odds of the
// label against them.
struct Rest {
  float top;
  double sum, odds;
};

inline Rest take_label(float* row, int64_t classes, int64_t label) {
  const float own = row[label];
  row[label] = kPadding;
  Rest rest;
  rest.top = row_max(row, classes);
  rest.odds = own;
  return rest;
}

}  // namespace

double FASTOKD_KERNEL(decoupled_row)(const DecoupledOptions& o, const void* logits,
                                     const void* target, int64_t label, float* scratch,
                                     float* gradient) {
  const int64_t width = padded(o.classes);
  float* const z = scratch;
  float* const t = scratch + width;
  scale_row(z, o.logits, logits, o.classes, o.inverse);
  scale_row(t, o.target, target, o.classes, o.inverse);
  Rest q = take_label(z, o.classes, label), p = take_label(t, o.classes, label);
  Total q_sum, p_sum, apart;
  for (int64_t i = 0; i < width; i += kLanes) {
    const Vec a = load(z + i) - q.top, b = load(t + i) - p.top;
    const Vec ea = exp(a), eb = exp(b);
    q_sum.add(ea);
    p_sum.add(eb);
    apart.add(eb * (b - a));
    store(z + i, ea);
    store(t + i, eb);
  }
  q.sum = q_sum.sum();
  p.sum = p_sum.sum();
  const double log_q = __builtin_log(q.sum), log_p = __builtin_log(p.sum);
  q.odds -= q.top + log_q;
  p.odds -= p.top + log_p;
  const double p_label = 1.0 / (1.0 + __builtin_exp(-p.odds));
  const double p_rest = 1.0 / (1.0 + __builtin_exp(p.odds));
  const double q_label = 1.0 / (1.0 + __builtin_exp(-q.odds));
  const double q_rest = 1.0 / (1.0 + __builtin_exp(q.odds));
  const double tckd = p_label * (softplus(-q.odds) - softplus(-p.odds)) +
                      p_rest * (softplus(q.odds) - softplus(p.odds));
  const double nckd = apart.sum() / p.sum - log_p + log_q;
  if (gradient) {
    // Of two differences that are the same, that of the smaller numbers.
    const double gap = p_label > 0.5 ? q_rest - p_rest : p_label - q_label;
    const float of_q = float(1.0 / q.sum), of_p = float(1.0 / p.sum);
    const float by_gap = float(o.scale * o.alpha * gap), by_beta = o.scale * o.beta;
    for (int64_t i = 0; i < width; i += kLanes) {
      const Vec a = load(z + i) * of_q, b = load(t + i) * of_p;
      store(z + i, (a - b) * by_beta + a * by_gap);
    }
    z[label] = -by_gap;
    write_row(gradient, z, o.classes);
  }
  return double(o.temperature) * o.temperature * (o.alpha * tckd + o.beta * nckd);
}

}  // namespace fastokd
