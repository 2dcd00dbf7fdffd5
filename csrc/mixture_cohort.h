// The most frequent case: mixed logits, one class id a sample, no extras, few students. Three passes
// read all rows at once and keep what they need in registers.
//
// The equations are those of mixture_distillation_kernel.cpp, with shares of 0 for sources at
// -inf; mixed logits are at most 0, so their exponentials need no maximum. Where a number is not finite,
// or the exponentials underflow, `cohort` writes nothing and returns false.
#pragma once

#include "mixture_sample.h"

namespace fastokd {
namespace {

// e^z from e^(z / T): a power of it for the usual temperatures.
inline Vec whole_power(Vec root, Vec z, float T) {
  return T == 3.0f ? root * root * root : T == 2.0f ? root * root : T == 1.0f ? root : exp(z);
}

// Calls body(i, count, whole) for each vector of a row; count is its lanes before the end.
template <typename Body>
inline void each_column(int64_t classes, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= classes; i += kLanes) body(i, kLanes);
  if (i < classes) body(i, int(classes - i));
}

template <typename T>
inline Vec load_lanes(const T* from, int count, float fill) {
  return count == kLanes ? load(from) : load_part(from, count, fill);
}

template <int S>
inline void sums(float* to, const Vec* vectors) {
  float totals[(S + 3) / 4 * 4];
  for (int s = 0; s < S; s += 4) {
    auto at = [&](int i) { return i < S ? vectors[i] : Vec{}; };
    sum4(totals + s, at(s), at(s + 1), at(s + 2), at(s + 3));
  }
  for (int s = 0; s < S; ++s) to[s] = totals[s];
}

template <int S, typename Element>
struct Cohort {
  Sample& x;
  const Element* rows[S];
  float top[S], share[S][S];  // of source n and student s
  float sum_e[kMaxSources], sum_q[kMaxSources], sum_t[S], mean[S];

  explicit Cohort(Sample& sample) : x(sample) {
    const SourceRows& from = x.loss.logits;
    for (int s = 0; s < S; ++s) {
      rows[s] = static_cast<const Element*>(from.data) + s * from.source_stride +
                x.b * from.sample_stride;
      for (int n = 0; n < S; ++n) share[n][s] = x.share[n][s];
      // A student without a target gets itself as source: its KL and its gradient are 0.
      if (!Sample::is_set(x.has_target[s])) share[s][s] = 1.0f;
    }
  }

  void find_tops() {
    Vec best[S];
    for (int s = 0; s < S; ++s) best[s] = splat(-kInfinity);
    each_column(x.C, [&](int64_t i, int count) {
      for (int s = 0; s < S; ++s) {
        best[s] = max(load_lanes(rows[s] + i, count, -kInfinity), best[s]);
      }
    });
    for (int s = 0; s < S; ++s) top[s] = max(best[s]);
  }

  Vec shifted(int s, int64_t i, int count) const {
    const Vec z = load_lanes(rows[s] + i, count, 0.0f) - top[s];
    return count == kLanes ? z : select(lane_below(count), z, splat(kPadding));
  }

  Vec mixed(int s, const Vec* z) const {
    Vec total = z[0] * share[0][s];
    for (int n = 1; n < S; ++n) total += z[n] * share[n][s];
    return total;
  }

  // Exponentials of logits and of mixed logits, their sums, and mean[s], that of mixed - z under
  // the target. Writes the rows x.q and x.mixed (powers of the mixed logits).
  bool find_sums() {
    Vec high[4][S] = {};
    int64_t i = 0;
    const int64_t ahead = x.b + 1 < x.loss.batch ? x.loss.logits.sample_stride : 0;
    const float scale = x.scale, T = x.T;
    while (i < x.C) {
      Vec total_e[S] = {}, total_q[S] = {}, total_t[S] = {}, products[S] = {};
      // Sums in two levels: their error doesn't grow with the number of classes.
      const int64_t stop = i + 32 * kLanes < x.C ? i + 32 * kLanes : x.C;
      for (; i < stop; i += kLanes) {
        const int count = x.C - i < kLanes ? int(x.C - i) : kLanes;
        Vec z[S];
        for (int s = 0; s < S; ++s) {
          z[s] = shifted(s, i, count);
          // Hardware prefetchers don't cross pages to the next sample's row.
          __builtin_prefetch(rows[s] + i + ahead);
        }
        for (int s = 0; s < S; ++s) {
          const Vec q = exp(z[s] * scale);
          store(x.q[s] + i, q);
          total_q[s] += q;
          total_e[s] += whole_power(q, z[s], T);
          const Vec m = mixed(s, z), t = exp(m * scale);
          store(x.mixed[s] + i, t);
          total_t[s] += t;
          products[s] += t * (m - z[s]);
        }
      }
      for (int s = 0; s < S; ++s) {
        high[0][s] += total_e[s], high[1][s] += total_q[s];
        high[2][s] += total_t[s], high[3][s] += products[s];
      }
    }
    sums<S>(sum_e, high[0]), sums<S>(sum_q, high[1]);
    sums<S>(sum_t, high[2]), sums<S>(mean, high[3]);
    bool fine = true;
    for (int s = 0; s < S; ++s) {
      mean[s] /= sum_t[s];
      // Comparisons with NaN are false.
      fine = fine && sum_e[s] < 1e30f && sum_q[s] < 1e30f && sum_t[s] > 1e-15f;
      fine = fine && mean[s] < 1e30f && mean[s] > -1e30f;
    }
    return fine;
  }

  void write_losses() {
    float log_e[kMaxSources], ratio[kMaxSources], log_ratio[kMaxSources];
    for (int s = 0; s < S; ++s) ratio[s] = sum_q[s] / sum_t[s];
    logs(log_e, sum_e, S);
    logs(log_ratio, ratio, S);
    for (int s = 0; s < S; ++s) {
      const float kl = mean[s] * x.scale + log_ratio[s];
      const float picked = x.label < 0 ? kNan : float_at(rows[s] + x.label) - top[s];
      x.term(0, s) = log_e[s] - picked;
      x.term(1, s) = Sample::is_set(x.has_target[s]) ? x.T * x.T * kl : 0.0f;
      x.term(2, s) = 0.0f;
    }
  }

  static float float_at(const Element* p) { return load_part(p, 1, 0.0f)[0]; }

  // Gradients in the logits, and in the shares.
  template <typename Out>
  void write_gradients(Out* to) {
    float per_e[S], per_q[S], per_t[S], per_g[S], weight[S];
    for (int s = 0; s < S; ++s) {
      const float w = Sample::is_set(x.has_target[s]) ? x.kd_scale(s) : 0.0f;
      weight[s] = x.loss.ce_weight[s] * x.per_sample;
      per_e[s] = weight[s] * x.label_mass / sum_e[s];
      per_q[s] = w / sum_q[s];
      per_t[s] = w / sum_t[s];
      per_g[s] = x.loss.detach_targets ? 0.0f : per_t[s] * x.scale;
    }
    const int64_t out_stride = x.loss.batch * x.C;
    Vec dots[S][S] = {};
    const float T = x.T;
    Out* next = to && x.b + 1 < x.loss.batch ? to + x.C : nullptr;
    each_column(x.C, [&](int64_t i, int count) {
      const Vec here = select(lane_below(int(x.label - i)), Vec{}, splat(1.0f));
      const Vec label = select(lane_below(int(x.label - i) + 1), here, Vec{});
      Vec z[S], base[S], g[S];
      for (int s = 0; s < S; ++s) {
        z[s] = shifted(s, i, count);
        if (next) __builtin_prefetch(next + s * out_stride + i, 1);
      }
      for (int s = 0; s < S; ++s) {
        const Vec q = load(x.q[s] + i), t = load(x.mixed[s] + i);
        const Vec r = (mixed(s, z) - z[s]) - mean[s];
        g[s] = t * per_g[s] * r;
        base[s] = whole_power(q, z[s], T) * per_e[s] - label * weight[s];
        base[s] += q * per_q[s] - t * per_t[s];
      }
      for (int n = 0; n < S; ++n) {
        for (int s = 0; s < S; ++s) {
          base[n] += g[s] * share[n][s];
          dots[n][s] += g[s] * z[n];
        }
        if (!to) continue;
        Out* out = to + n * out_stride + i;
        if (count == kLanes) {
          store(out, base[n]);
        } else {
          store_part(out, base[n], count);
        }
      }
    });
    for (int n = 0; x.asks_scores && n < S; ++n) sums<S>(x.grad_share[n], dots[n]);
  }

  bool run() {
    find_tops();
    if (!find_sums()) return false;
    write_losses();
    if (!x.asks_gradient) return true;
    if (x.loss.grad_logits_type == Type::kBFloat16) {
      BFloat16* to = static_cast<BFloat16*>(x.loss.grad_logits);
      write_gradients(to ? to + x.b * x.C : nullptr);
    } else {
      float* to = static_cast<float*>(x.loss.grad_logits);
      write_gradients(to ? to + x.b * x.C : nullptr);
    }
    return true;
  }
};

template <int S>
bool cohort_of(Sample& x) {
  switch (x.loss.logits.type) {
    case Type::kFloat: return Cohort<S, float>(x).run();
    case Type::kBFloat16: return Cohort<S, BFloat16>(x).run();
    case Type::kHalf: return Cohort<S, Half>(x).run();
  }
  return false;
}

// Losses and gradients in logits and shares, or false: then nothing is written.
bool cohort(Sample& x) {
  if (x.by_source || x.loss.has_mixture_ce || x.N > x.S || !x.loss.labels || x.loss.smoothing > 0 ||
      x.loss.labels2 || x.loss.sample_weight) {
    return false;
  }
  switch (x.S) {
    case 2: return cohort_of<2>(x);
    case 3: return cohort_of<3>(x);
    case 4: return cohort_of<4>(x);
    default: return false;
  }
}

}  // namespace
}  // namespace fastokd
