// mixture_distillation, one sample after another: its rows stay in the nearest caches, and every
// exponential is taken once.
//
// For student s, source n and class c, with a_sn = softmax of the scores, q_n = softmax(z_n / T),
// t_s the target, r_s = log t_s - log q_s, w_s = kd_weight_s T / B:
//
//   d total / d z_s = ce_weight_s / B (softmax(z_s) - labels) + w_s (q_s - t_s), and as a source
//   logits:   g_s = w_s t_s (r_s - sum_c t_s r_s), the gradient in the mixed logits:
//             d z_n += a_sn g_s,                    d a_sn = sum_c g_s z_n
//   probs:    D_sn = sum_c q_n r_s:
//             d z_n += w_s a_sn q_n (r_s - D_sn),   d a_sn = w_s T D_sn
//   pairwise: as probs, with log q_n - log q_s in the place of r_s.
//
// z stands for logits less their row's maximum throughout: no term depends on it.
#include "mixture_sample.h"

namespace fastokd {
namespace {

// The exponentials of a row at T, and at 1 where `e` isn't null.
void exponentials(Sample& x, int n, float* e) {
  Vec total_e{}, total_q{};
  for (int64_t i = 0; i < x.length; i += kLanes) {
    const Vec z = load(x.z[n] + i), q = exp(z * x.scale);
    store(x.q[n] + i, q);
    total_q += q;
    if (e) {
      const Vec power = exp(z);
      store(e + i, power);
      total_e += power;
    }
  }
  x.sum_e[n] = sum(total_e);
  x.sum_q[n] = sum(total_q);
  x.log_q[n] = __builtin_logf(x.sum_q[n]);
}

// The gradient in student s's own logits over x.e; t null where it has no target.
void own_gradient(Sample& x, int s, const float* t, float per_t) {
  const float weight = x.args.ce_weight[s] * x.per_sample;
  const float per_e = weight * x.label_mass / x.sum_e[s], per_q = x.kd_scale(s) / x.sum_q[s];
  float* e = x.e[s];
  const float* q = x.q[s];
  for (int64_t i = 0; i < x.length; i += kLanes) {
    Vec gradient = load(e + i) * per_e;
    if (t) gradient += load(q + i) * per_q - load(t + i) * per_t;
    store(e + i, gradient);
  }
  x.subtract_labels(e, weight);
}

// Mixed logits of student s over x.mixed; their maximum.
float mix_logits(Sample& x, int s) {
  const Mixture& m = x.mixtures[s];
  const float* rows[kMaxSources];
  for (int k = 0; k < m.count; ++k) rows[k] = x.z[m.source[k]];
  row_mix(x.mixed[s], nullptr, rows, m.share, m.count, x.length, x.spare);
  return row_max(x.mixed[s], x.C);
}

// KL to the softmax of the mixed logits; its gradient in them over x.mixed.
void mixed_logits_kl(Sample& x, int s, float top) {
  float *mixed = x.mixed[s], *t = x.target;
  const float* z = x.z[s];
  Vec total{}, dot{};
  for (int64_t i = 0; i < x.length; i += kLanes) {
    const Vec shifted = load(mixed + i) - top, power = exp(shifted * x.scale);
    store(t + i, power);
    total += power;
    dot += power * (shifted - load(z + i));
  }
  const float sum_t = sum(total), log_ratio = x.log_q[s] - __builtin_logf(sum_t);
  const float kl = sum(dot) / sum_t * x.scale + log_ratio;
  x.loss(1, s) = x.T * x.T * kl;
  if (!x.asks_gradient) return;
  const float per_t = x.kd_scale(s) / sum_t, centre = log_ratio - kl - top * x.scale;
  own_gradient(x, s, t, per_t);
  if (x.args.detach_targets) return;
  for (int64_t i = 0; i < x.length; i += kLanes) {
    const Vec r = (load(mixed + i) - load(z + i)) * x.scale + centre;
    store(mixed + i, load(t + i) * per_t * r);
  }
}

// The log of a vector of mixed probabilities whose sum may have underflowed.
Vec log_of_mixture(const Sample& x, const Mixture& m, int64_t i) {
  Vec terms[kMaxSources], top = splat(-kInfinity), total{};
  for (int k = 0; k < m.count; ++k) {
    const int n = m.source[k];
    terms[k] = load(x.z[n] + i) * x.scale + (m.log_share[k] - x.log_q[n]);
    top = max(terms[k], top);
  }
  for (int k = 0; k < m.count; ++k) total += exp(terms[k] - top);
  return log(total) + top;
}

// KL to the mixed probabilities x.target; r over x.r.
float mixed_probs_kl(Sample& x, int s) {
  Vec total{};
  for (int64_t i = 0; i < x.length; i += kLanes) {
    const Vec t = load(x.target + i);
    const VecInt valid = lane_below(int(x.C - i));
    const bool tiny = any((t < splat(1e-30f)) & valid);
    const Vec log_t = tiny ? log_of_mixture(x, x.mixtures[s], i) : log(t);
    const Vec r = select(valid, log_t - load(x.z[s] + i) * x.scale + x.log_q[s], Vec{});
    store(x.r[s] + i, r);
    total += t * r;
  }
  return sum(total);
}

// KL of source n to student s.
float pair_kl(const Sample& x, int s, int n) {
  Vec total{};
  for (int64_t i = 0; i < x.length; i += kLanes) {
    total += load(x.q[n] + i) * (load(x.z[n] + i) - load(x.z[s] + i));
  }
  return sum(total) / x.sum_q[n] * x.scale + (x.log_q[s] - x.log_q[n]);
}

// The kd term where each source has its own softmax.
void by_source_kl(Sample& x, int s) {
  const Mixture& m = x.mixtures[s];
  const float* rows[kMaxSources];
  float shares[kMaxSources];
  for (int k = 0; k < m.count; ++k) {
    rows[k] = x.q[m.source[k]];
    shares[k] = m.share[k] / x.sum_q[m.source[k]];
  }
  row_mix(x.target, nullptr, rows, shares, m.count, x.length, x.spare);
  const bool probs = x.args.mix == Mix::kProbs;
  float kl = probs ? mixed_probs_kl(x, s) : 0.0f;
  for (int k = 0; k < m.count; ++k) {
    const int n = m.source[k];
    x.pair_mean[s][n] =
        probs ? row_dot(rows[k], x.r[s], x.length) / x.sum_q[n] : pair_kl(x, s, n);
    if (!probs) kl += m.share[k] * x.pair_mean[s][n];
  }
  x.loss(1, s) = x.T * x.T * kl;
  if (x.asks_gradient) own_gradient(x, s, x.target, x.kd_scale(s));
}

// The losses of student s and its own gradient; what its sources need for theirs.
void student(Sample& x, int s) {
  x.loss(0, s) = x.cross_entropy(x.z[s], __builtin_logf(x.sum_e[s]));
  x.loss(1, s) = x.loss(2, s) = 0.0f;
  if (!x.mixtures[s].count) {
    if (x.asks_gradient) own_gradient(x, s, nullptr, 0.0f);
    return;
  }
  const bool mixture_ce = x.args.has_mixture_ce;
  const float top = !x.by_source || mixture_ce ? mix_logits(x, s) : 0.0f;
  float per_power = 0.0f;
  const float weight = x.args.mixture_weight[s] * x.per_sample;
  if (mixture_ce) {
    Vec total{};
    for (int64_t i = 0; i < x.length; i += kLanes) {
      const Vec power = exp(load(x.mixed[s] + i) - top);
      store(x.powers + i, power);
      total += power;
    }
    x.loss(2, s) = x.cross_entropy(x.mixed[s], __builtin_logf(sum(total)) + top);
    per_power = weight * x.label_mass / sum(total);
  }
  if (x.by_source) {
    by_source_kl(x, s);
  } else {
    mixed_logits_kl(x, s, top);
  }
  if (!x.asks_gradient || !x.through_mixed) return;
  if (mixture_ce) {
    const bool adds = !x.by_source && !x.args.detach_targets;
    const float* powers = x.powers;
    row_mix(x.mixed[s], adds ? x.mixed[s] : nullptr, &powers, &per_power, 1, x.length, x.spare);
    x.subtract_labels(x.mixed[s], weight);
  }
  // Behind the last class the sources hold large numbers.
  for (int64_t c = x.C; c < x.length; ++c) x.mixed[s][c] = 0.0f;
}

// What source n gets through its own softmax, added to x.e (or over it, for an extra).
void gradient_by_source(Sample& x, int n) {
  const bool pairs = x.args.mix == Mix::kPairwise;
  const float* rows[kMaxSources + 1];
  float coefficients[kMaxSources + 1], constant = 0.0f, own = 0.0f;
  int count = 0;
  for (int s = 0; s < x.S; ++s) {
    const Mixture& m = x.mixtures[s];
    for (int k = 0; k < m.count; ++k) {
      if (m.source[k] != n) continue;
      const float c = x.kd_scale(s) * m.share[k] / x.sum_q[n];
      rows[count] = pairs ? x.z[s] : x.r[s];
      coefficients[count++] = pairs ? -c * x.scale : c;
      constant += c * ((pairs ? x.log_q[s] - x.log_q[n] : 0.0f) - x.pair_mean[s][n]);
      own += c * x.scale;
    }
  }
  if (pairs) rows[count] = x.z[n], coefficients[count++] = own;
  row_mix(x.spare, nullptr, rows, coefficients, count, x.length, x.powers);
  for (int64_t i = 0; i < x.length; i += kLanes) {
    const Vec gradient = load(x.q[n] + i) * (load(x.spare + i) + constant);
    store(x.e[n] + i, n < x.S ? load(x.e[n] + i) + gradient : gradient);
  }
}

template <typename T>
void write_row(Sample& x, void* data, int64_t row, const float* base, const float* const* rows,
               const float* shares, int count) {
  row_mix(static_cast<T*>(data) + row * x.C, base, rows, shares, count, x.C, x.spare);
}

// The gradient in source n's logits.
void write_source(Sample& x, int n) {
  const bool is_student = n < x.S;
  void* data = is_student ? x.args.grad_logits : x.args.grad_extra;
  if (!data) return;
  const bool through_own = x.by_source && !x.args.detach_targets && x.heard(n);
  if (through_own) gradient_by_source(x, n);
  const float* base = is_student || through_own ? x.e[n] : nullptr;
  const float* rows[kMaxSources];
  float shares[kMaxSources];
  int count = 0;
  for (int s = 0; s < x.S && x.through_mixed; ++s) {
    const Mixture& m = x.mixtures[s];
    for (int k = 0; k < m.count; ++k) {
      if (m.source[k] == n) rows[count] = x.mixed[s], shares[count++] = m.share[k];
    }
  }
  const int64_t row = (is_student ? n : n - x.S) * x.args.batch + x.b;
  switch (is_student ? x.args.grad_logits_type : x.args.grad_extra_type) {
    case Type::kFloat: return write_row<float>(x, data, row, base, rows, shares, count);
    case Type::kBFloat16: return write_row<BFloat16>(x, data, row, base, rows, shares, count);
    case Type::kHalf: return;  // gradients of halves are floats
  }
}

void write_scores(Sample& x) {
  float gradient[kMaxSources][kMaxSources] = {};
  for (int s = 0; s < x.S; ++s) {
    const Mixture& m = x.mixtures[s];
    for (int k = 0; k < m.count; ++k) {
      const int n = m.source[k];
      if (x.by_source && !x.args.detach_targets) {
        gradient[s][k] = x.kd_scale(s) * x.T * x.pair_mean[s][n];
      }
      if (x.through_mixed) gradient[s][k] += row_dot(x.mixed[s], x.z[n], x.length);
    }
  }
  x.write_scores(gradient);
}

}  // namespace

void FASTOKD_KERNEL(mixture_distillation_range)(const MixtureArgs& args, int64_t begin, int64_t end,
                                                float* scratch) {
  for (int64_t b = begin; b < end; ++b) {
    Sample x(args, scratch, b);
    for (int n = 0; n < x.N; ++n) {
      if (n >= x.S && !x.heard(n)) continue;
      x.read_row(n);
      if (n < x.S || x.by_source) exponentials(x, n, n < x.S ? x.e[n] : nullptr);
    }
    for (int s = 0; s < x.S; ++s) student(x, s);
    if (!x.asks_gradient) continue;
    for (int n = 0; n < x.N; ++n) write_source(x, n);
    if (args.grad_scores || args.grad_query || args.grad_key) write_scores(x);
  }
}

}  // namespace fastokd
