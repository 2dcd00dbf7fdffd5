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
//   pairwise: as probs, with log q_n - log q_s in the place of r_s (D_sn less its constant).
//
// z are logits minus their row's maximum throughout: no term depends on it. A sum's log and division
// need the whole row, so each step is taken for all students before the next.
#include "mixture_cohort.h"

namespace fastokd {
namespace {

// A row minus its maximum, and its exponentials where they are needed.
template <typename Element>
void read_row(Sample& x, int n, const Element* from, float top) {
  float *z = x.z[n], *q = n < x.S || x.by_source ? x.q[n] : nullptr;
  float* e = n < x.S ? x.e[n] : nullptr;
  const bool doubled = x.T == 2.0f, tripled = x.T == 3.0f;  // e^z is a power of e^(z / T)
  Total total_e, total_q;
  const float scale = x.scale;
  each_shifted(from, top, x.C, [&](int64_t i, Vec shifted) {
    store(z + i, shifted);
    if (!q) return;
    const Vec root = exp(shifted * scale);
    store(q + i, root);
    total_q.add(root);
    if (!e) return;
    const Vec power = doubled ? root * root : tripled ? root * root * root : exp(shifted);
    store(e + i, power);
    total_e.add(power);
  });
  x.sum_e[n] = total_e.sum();
  x.sum_q[n] = total_q.sum();
}

template <typename Element>
void read_rows(Sample& x, const SourceRows& from, int begin, int end) {
  const Element* data = static_cast<const Element*>(from.data) + x.b * from.sample_stride;
  float top[kMaxSources];
  for (int n = begin; n < end; ++n) {
    top[n] = row_max(data + (n - begin) * from.source_stride, x.C);
  }
  for (int n = begin; n < end; ++n) {
    if (n >= x.S && !x.listeners[n].count) continue;
    read_row(x, n, data + (n - begin) * from.source_stride, top[n]);
  }
}

void read_rows(Sample& x, const SourceRows& from, int begin, int end) {
  switch (from.type) {
    case Type::kFloat: return read_rows<float>(x, from, begin, end);
    case Type::kBFloat16: return read_rows<BFloat16>(x, from, begin, end);
    case Type::kHalf: return read_rows<Half>(x, from, begin, end);
  }
}

// The mixed logits of student s; their maximum.
float mix_logits(Sample& x, int s) {
  const Links& heard = x.sources[s];
  const float* rows[kMaxSources];
  float top;
  for (int k = 0; k < heard.count; ++k) rows[k] = x.z[heard.other[k]];
  row_mix(x.mixed[s], nullptr, rows, heard.share, heard.count, x.length, x.spare, &top);
  return top;
}

// e^(mixed / temperature), less its maximum; the sum, and the mean of mixed - z under it.
float mixed_powers(const Sample& x, int s, float top, float scale, float* to, float* mean) {
  const float *mixed = x.mixed[s], *z = x.z[s];
  Total total, products;
  for (int64_t i = 0; i < x.length; i += kLanes) {
    const Vec shifted = load(mixed + i) - top, power = exp(shifted * scale);
    store(to + i, power);
    total.add(power);
    if (mean) products.add(power * (shifted - load(z + i)));
  }
  if (mean) *mean = products.sum() / total.sum();
  return total.sum();
}

// The gradient in student s's own logits over x.e, t null where it has no target; that in its
// mixed logits, where `through`, over x.mixed: w t (r - sum t r), where r is (mixed - top - z) / T
// but for a constant. A difference of differences: for a one-hot target it is exactly 0.
void own_gradient(Sample& x, int s, const float* t, float per_t, bool through, float top,
                  float mean) {
  const float weight = x.loss.ce_weight[s] * x.per_sample;
  const float per_e = weight * x.label_mass / x.sum_e[s], per_q = x.kd_scale(s) / x.sum_q[s];
  float *e = x.e[s], *mixed = x.mixed[s];
  const float *q = x.q[s], *z = x.z[s], scale = x.scale;
  for (int64_t i = 0; i < x.length; i += kLanes) {
    Vec gradient = load(e + i) * per_e;
    if (t) {
      const Vec target = load(t + i) * per_t;
      gradient += load(q + i) * per_q - target;
      if (through) {
        const Vec r = (load(mixed + i) - top - load(z + i)) - mean;
        store(mixed + i, target * (r * scale));
      }
    }
    store(e + i, gradient);
  }
  x.subtract_labels(e, weight);
}

// The log of a vector of mixed probabilities whose sum may have underflowed.
Vec log_of_mixture(const Sample& x, int s, int64_t i) {
  const Links& heard = x.sources[s];
  Vec terms[kMaxSources], top = splat(-kInfinity), total{};
  for (int k = 0; k < heard.count; ++k) {
    const int n = heard.other[k];
    terms[k] = load(x.z[n] + i) * x.scale + (x.log_share[n][s] - x.log_q[n]);
    top = max(terms[k], top);
  }
  for (int k = 0; k < heard.count; ++k) total += exp(terms[k] - top);
  return log(total) + top;
}

// KL to the mixed probabilities x.target; r over x.r.
float mixed_probs_kl(Sample& x, int s) {
  Total total;
  for (int64_t i = 0; i < x.length; i += kLanes) {
    const Vec t = load(x.target[s] + i);
    const VecInt valid = lane_below(int(x.C - i));
    const bool tiny = any((t < splat(1e-30f)) & valid);
    const Vec log_t = tiny ? log_of_mixture(x, s, i) : log(t);
    const Vec r = select(valid, log_t - load(x.z[s] + i) * x.scale + x.log_q[s], Vec{});
    store(x.r[s] + i, r);
    total.add(t * r);
  }
  return total.sum();
}

// The mean of z_n - z_s under q_n.
float pair_mean(const Sample& x, int s, int n) {
  Total total;
  for (int64_t i = 0; i < x.length; i += kLanes) {
    total.add(load(x.q[n] + i) * (load(x.z[n] + i) - load(x.z[s] + i)));
  }
  return total.sum() / x.sum_q[n];
}

// KL of student s where each source has its own softmax, over x.target.
float by_source_kl(Sample& x, int s) {
  const Links& heard = x.sources[s];
  const float* rows[kMaxSources];
  float shares[kMaxSources], ratios[kMaxSources], log_ratios[kMaxSources], kl = 0;
  for (int k = 0; k < heard.count; ++k) {
    const int n = heard.other[k];
    rows[k] = x.q[n];
    shares[k] = heard.share[k] / x.sum_q[n];
    ratios[k] = x.sum_q[s] / x.sum_q[n];
  }
  row_mix(x.target[s], nullptr, rows, shares, heard.count, x.length, x.spare);
  logs(log_ratios, ratios, heard.count);
  const bool probs = x.loss.mix == Mix::kProbs;
  if (probs) kl = mixed_probs_kl(x, s);
  for (int k = 0; k < heard.count; ++k) {
    const int n = heard.other[k];
    float& mean = x.pair_mean[n][s];
    mean = probs ? row_dot(rows[k], x.r[s], x.length) / x.sum_q[n] : pair_mean(x, s, n);
    const float pair = probs ? mean : mean * x.scale + log_ratios[k];
    if (!probs) kl += heard.share[k] * pair;
    if (!x.loss.detach_targets) x.grad_share[n][s] = x.kd_scale(s) * x.T * pair;
  }
  return kl;
}

// The losses of all students; their own gradients over x.e, those in mixed logits over x.mixed.
void students(Sample& x) {
  const bool mixture_ce = x.loss.has_mixture_ce, pass = !x.loss.detach_targets;
  float top[kMaxSources], mean[kMaxSources], sum_t[kMaxSources], sum_m[kMaxSources];
  float ratio[kMaxSources], log_ratio[kMaxSources], log_m[kMaxSources];
  for (int s = 0; s < x.S; ++s) {
    ratio[s] = sum_m[s] = 1.0f;
    if (!x.sources[s].count || (x.by_source && !mixture_ce)) continue;
    top[s] = mix_logits(x, s);
    if (!x.by_source) {
      sum_t[s] = mixed_powers(x, s, top[s], x.scale, x.target[s], &mean[s]);
      ratio[s] = x.sum_q[s] / sum_t[s];
    }
    if (mixture_ce) sum_m[s] = mixed_powers(x, s, top[s], 1.0f, x.powers[s], nullptr);
  }
  logs(log_ratio, ratio, x.S);
  logs(log_m, sum_m, x.S);
  for (int s = 0; s < x.S; ++s) {
    x.term(0, s) = x.cross_entropy(x.z[s], x.log_e[s]);
    x.term(1, s) = x.term(2, s) = 0.0f;
    if (!x.sources[s].count) {
      if (x.asks_gradient) own_gradient(x, s, nullptr, 0.0f, false, 0.0f, 0.0f);
      continue;
    }
    if (mixture_ce) x.term(2, s) = x.cross_entropy(x.mixed[s], log_m[s] + top[s]);
    const float w = x.kd_scale(s);
    x.term(1, s) =
        x.T * x.T * (x.by_source ? by_source_kl(x, s) : mean[s] * x.scale + log_ratio[s]);
    if (!x.asks_gradient) continue;
    if (x.by_source) {
      own_gradient(x, s, x.target[s], w, false, 0.0f, 0.0f);
    } else {
      own_gradient(x, s, x.target[s], w / sum_t[s], pass, top[s], mean[s]);
    }
    if (mixture_ce) {
      const float weight = x.loss.mixture_weight[s] * x.per_sample;
      const float per_power = weight * x.label_mass / sum_m[s];
      const float *powers = x.powers[s], *base = !x.by_source && pass ? x.mixed[s] : nullptr;
      row_mix(x.mixed[s], base, &powers, &per_power, 1, x.length, x.spare);
      x.subtract_labels(x.mixed[s], weight);
    }
  }
}

// The gradient of source n through its own softmax, added to x.e (an extra's overwrites it).
void gradient_by_source(Sample& x, int n) {
  const bool pairs = x.loss.mix == Mix::kPairwise;
  const Links& listeners = x.listeners[n];
  float weights[kMaxSources];
  for (int k = 0; k < listeners.count; ++k) {
    const float w = x.kd_scale(listeners.other[k]) * (pairs ? x.scale : 1.0f);
    weights[k] = w * listeners.share[k] / x.sum_q[n];
  }
  for (int64_t i = 0; i < x.length; i += kLanes) {
    const Vec z = load(x.z[n] + i);
    Vec total{};
    for (int k = 0; k < listeners.count; ++k) {
      const int s = listeners.other[k];
      const Vec r = pairs ? z - load(x.z[s] + i) : load(x.r[s] + i);
      total += (r - x.pair_mean[n][s]) * weights[k];
    }
    const Vec gradient = load(x.q[n] + i) * total;
    store(x.e[n] + i, n < x.S ? load(x.e[n] + i) + gradient : gradient);
  }
}

// The gradient in source n's logits, and in its shares through the mixed logits.
void source(Sample& x, int n) {
  const bool is_student = n < x.S;
  void* data = is_student ? x.loss.grad_logits : x.loss.grad_extra;
  const Links& listeners = x.listeners[n];
  if (!data && !(x.asks_scores && x.through_mixed)) return;
  const bool through_own = x.by_source && !x.loss.detach_targets && listeners.count;
  if (through_own && data) gradient_by_source(x, n);
  const float* base = is_student || through_own ? x.e[n] : nullptr;
  const float* rows[kMaxSources];
  float dots[kMaxSources];
  const int count = x.through_mixed ? listeners.count : 0;
  for (int k = 0; k < count; ++k) rows[k] = x.mixed[listeners.other[k]];
  const float* with = x.asks_scores && count ? x.z[n] : nullptr;
  const int64_t row = ((is_student ? n : n - x.S) * x.loss.batch + x.b) * x.C;
  const Type type = is_student ? x.loss.grad_logits_type : x.loss.grad_extra_type;
  auto write = [&](auto* to) {
    row_mix(to, base, rows, listeners.share, count, x.C, x.spare, nullptr, with, dots);
  };
  if (!data) {
    write(x.unused);
  } else if (type == Type::kBFloat16) {
    write(static_cast<BFloat16*>(data) + row);
  } else {
    write(static_cast<float*>(data) + row);
  }
  for (int k = 0; with && k < count; ++k) x.grad_share[n][listeners.other[k]] += dots[k];
}

void any_sample(Sample& x) {
  x.read_links();
  read_rows(x, x.loss.logits, 0, x.S);
  if (x.N > x.S) read_rows(x, x.loss.extra, x.S, x.N);
  logs(x.log_e, x.sum_e, x.S);
  if (x.loss.mix == Mix::kProbs) logs(x.log_q, x.sum_q, x.N);
  students(x);
  for (int n = 0; x.asks_gradient && n < x.N; ++n) source(x, n);
}

}  // namespace

void FASTOKD_KERNEL(mixture_distillation_range)(const Loss& loss, int64_t begin, int64_t end,
                                                float* scratch) {
  for (int64_t b = begin; b < end; ++b) {
    Sample x(loss, scratch, b);
    if (!cohort(x)) any_sample(x);
    if (x.asks_scores) x.write_scores();
  }
}

}  // namespace fastokd
