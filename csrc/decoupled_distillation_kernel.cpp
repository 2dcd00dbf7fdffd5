// With d the log odds of the label against the rest, p_y = 1 / (1 + e^-d). In the label's logit and in the
// rest's (r their softmax among themselves) the gradients are
//   alpha (q_y - p_y)   and   alpha (p_y - q_y) r_q + beta (r_q - r_p),   times T / B.
#include "decoupled_distillation_kernel.h"

#include "target_rows.h"

namespace fastokd {
namespace {

// log(1 + e^x).
inline double softplus(double x) {
  return x > 0.0 ? x + __builtin_log1p(__builtin_exp(-x)) : __builtin_log1p(__builtin_exp(x));
}

// The label against the rest: its log odds, and its probability and theirs.
struct Odds {
  double log, label, rest;
};

// The logits but the label's less the largest of them, scaled, and kPadding in the label's place; the
// label's.
inline float read_rest(float* to, Type type, const void* from, int64_t classes, int64_t label,
                       float by) {
  typed(type, from, [&](const auto* row) {
    const float before = row_max(row, label);
    const float after = row_max(row + label + 1, classes - label - 1);
    scale_row(to, row, classes, before > after ? before : after, by);
  });
  const float own = to[label];
  to[label] = kPadding;
  return own == kInfinity ? kNan : own;
}

inline Odds odds(float label, double log_rest) {
  const double log = label - log_rest;
  return {log, 1.0 / (1.0 + __builtin_exp(-log)), 1.0 / (1.0 + __builtin_exp(log))};
}

}  // namespace

double FASTOKD_KERNEL(decoupled_row)(const DecoupledOptions& o, const void* logits,
                                     const void* target, int64_t label, float* scratch,
                                     float* gradient) {
  const int64_t width = padded(o.classes);
  float* const z = scratch;
  float* const t = scratch + width;
  const float z_label = read_rest(z, o.logits, logits, o.classes, label, o.inverse);
  const float t_label = read_rest(t, o.target, target, o.classes, label, o.inverse);
  Total q_total, p_total, apart;
  for (int64_t i = 0; i < width; i += kLanes) {
    const Vec a = load(z + i), b = load(t + i), ea = exp(a), eb = exp(b);
    q_total.add(ea);
    p_total.add(eb);
    apart.add(eb * (b - a));
    store(z + i, ea);
    store(t + i, eb);
  }
  const double q_sum = whole(q_total), p_sum = whole(p_total);
  const double log_q = __builtin_log(q_sum), log_p = __builtin_log(p_sum);
  const Odds q = odds(z_label, log_q), p = odds(t_label, log_p);
  if (gradient) {
    // Of two differences that are equal, that of the smaller numbers.
    const double gap = p.label > 0.5 ? q.rest - p.rest : p.label - q.label;
    const float of_q = float(1.0 / q_sum), of_p = float(1.0 / p_sum);
    const float by_gap = float(o.scale * o.alpha * gap), by_beta = o.scale * o.beta;
    for (int64_t i = 0; i < width; i += kLanes) {
      const Vec a = load(z + i) * of_q, b = load(t + i) * of_p;
      store(z + i, (a - b) * by_beta + a * by_gap);
    }
    z[label] = -by_gap;
    write_row(gradient, z, o.classes);
  }
  const double tckd = p.label * (softplus(-q.log) - softplus(-p.log)) +
                      p.rest * (softplus(q.log) - softplus(p.log));
  const double nckd = whole(apart) / p_sum - log_p + log_q;
  return double(o.temperature) * o.temperature * (o.alpha * tckd + o.beta * nckd);
}

}  // namespace fastokd
