// One sample of mixture_distillation: its rows in scratch memory, its labels, who listens to whom.
#pragma once

#include "mixture_distillation_kernel.h"
#include "rows.h"

namespace fastokd {
namespace {

// Whom a student listens to, and how much.
struct Mixture {
  int count;
  int source[kMaxSources];
  float share[kMaxSources], log_share[kMaxSources];
};

struct Sample {
  const MixtureArgs& args;
  const int64_t b, C, length;
  const int S, N;
  const float T, scale, per_sample;  // temperature, 1 / T, 1 / B
  const bool by_source;              // each source has its softmax; otherwise the mixture has one
  const bool asks_gradient;
  const bool through_mixed;  // gradient reaches the sources through the mixed logits

  // Scratch rows. z: logits less their maximum; e: e^z, then the gradient in z; q: e^(z / T);
  // mixed: mixed logits, then the gradient in them; r: log t - log q, of the mixed probabilities.
  float *z[kMaxSources], *e[kMaxSources], *q[kMaxSources], *mixed[kMaxSources], *r[kMaxSources];
  float *target, *powers, *spare;  // of one student at a time

  float sum_e[kMaxSources], sum_q[kMaxSources], log_q[kMaxSources];
  Mixture mixtures[kMaxSources];
  float pair_mean[kMaxSources][kMaxSources];  // D_sn
  int64_t label;     // -1: soft labels, or an id out of range
  float label_mass;  // the sum of the smoothed labels; NaN for an id out of range

  Sample(const MixtureArgs& a, float* scratch, int64_t index)
      : args(a),
        b(index),
        C(a.classes),
        length(padded(a.classes)),
        S(a.students),
        N(a.students + a.extras),
        T(a.temperature),
        scale(1.0f / a.temperature),
        per_sample(1.0f / float(a.batch)),
        by_source(a.mix != Mix::kLogits),
        asks_gradient(a.grad_logits || a.grad_extra || a.grad_scores || a.grad_query || a.grad_key),
        through_mixed((!by_source && !a.detach_targets) || a.has_mixture_ce) {
    auto next = [&] {
      float* row = scratch;
      scratch += length;
      return row;
    };
    target = next(), powers = next(), spare = next();
    for (int n = 0; n < N; ++n) z[n] = next(), e[n] = next(), q[n] = next();
    for (int s = 0; s < S; ++s) mixed[s] = next(), r[s] = next();
    read_label();
    read_scores();
  }

  float& loss(int term, int s) const { return args.losses[(term * S + s) * args.batch + b]; }
  float kd_scale(int s) const { return args.kd_weight[s] * T * per_sample; }
  bool heard(int n) const {
    for (int s = 0; s < S; ++s) {
      for (int k = 0; k < mixtures[s].count; ++k) {
        if (mixtures[s].source[k] == n) return true;
      }
    }
    return false;
  }

  void read_label() {
    label = -1;
    label_mass = 1.0f;
    if (!args.labels) {
      label_mass = (1.0f - args.smoothing) * row_sum(args.soft_labels + b * C, C) + args.smoothing;
    } else if (args.labels[b] >= 0 && args.labels[b] < C) {
      label = args.labels[b];
    } else {
      label_mass = kNan;
    }
  }

  float score(int s, int n) const {
    const int P = args.peers;
    if (!args.query) {
      const int64_t* stride = args.score_strides;
      return args.scores[b * stride[0] + s * stride[1] + n * stride[2]];
    }
    if (n >= P) return -kInfinity;  // nobody listens to the leader,
    if (s >= P) return 0.0f;        // and it listens to every peer alike
    return row_dot(args.query + (b * P + s) * args.width, args.key + (b * P + n) * args.width,
                   args.width);
  }

  void read_scores() {
    for (int s = 0; s < S; ++s) {
      Mixture& m = mixtures[s];
      m.count = 0;
      float shifted[kMaxSources], power[kMaxSources], top = -kInfinity, total = 0;
      for (int n = 0; n < N; ++n) {
        const float value = score(s, n);
        if (value == -kInfinity) continue;
        top = value > top ? value : top;
        shifted[m.count] = value;
        m.source[m.count++] = n;
      }
      for (int k = 0; k < kMaxSources; ++k) shifted[k] = k < m.count ? shifted[k] - top : kPadding;
      for (int k = 0; k < kMaxSources; k += kLanes) store(power + k, exp(load(shifted + k)));
      for (int k = 0; k < m.count; ++k) total += power[k];
      const float log_total = __builtin_logf(total);
      for (int k = 0; k < m.count; ++k) {
        m.share[k] = power[k] / total;
        m.log_share[k] = shifted[k] - log_total;
      }
    }
  }

  template <typename T>
  void read_row(float* to, const void* data, int64_t offset) const {
    const T* row = static_cast<const T*>(data) + offset;
    row_shift(to, row, row_max(row, C), C);
  }
  void read_row(int n) {
    const SourceRows& from = n < S ? args.logits : args.extra;
    const int64_t offset = (n < S ? n : n - S) * from.source_stride + b * from.sample_stride;
    switch (from.type) {
      case Type::kFloat: return read_row<float>(z[n], from.data, offset);
      case Type::kBFloat16: return read_row<BFloat16>(z[n], from.data, offset);
      case Type::kHalf: return read_row<Half>(z[n], from.data, offset);
    }
  }

  // CE to the sample's labels of the softmax of a row whose log of the sum of powers is `log_sum`.
  float cross_entropy(const float* row, float log_sum) const {
    const float keep = 1.0f - args.smoothing;
    float ce = label_mass * log_sum;
    if (label >= 0) ce -= keep * row[label];
    if (!args.labels) ce -= keep * row_dot(args.soft_labels + b * C, row, C);
    if (args.smoothing > 0) ce -= args.smoothing / float(C) * row_sum(row, C);
    return ce;
  }

  // gradient -= weight * smoothed labels
  void subtract_labels(float* gradient, float weight) const {
    const float keep = weight * (1.0f - args.smoothing);
    if (label >= 0) gradient[label] -= keep;
    if (args.labels && args.smoothing == 0) return;
    const float* soft = args.labels ? nullptr : args.soft_labels + b * C;
    const float each = weight * args.smoothing / float(C);
    for (int64_t c = 0; c < C; ++c) gradient[c] -= each + (soft ? keep * soft[c] : 0.0f);
  }

  // From the gradient in each share, that in the scores; then in the queries and keys.
  void write_scores(const float (*grad_share)[kMaxSources]) const {
    float gradient[kMaxSources][kMaxSources] = {};
    for (int s = 0; s < S; ++s) {
      const Mixture& m = mixtures[s];
      float mean = 0;
      for (int k = 0; k < m.count; ++k) mean += m.share[k] * grad_share[s][k];
      for (int k = 0; k < m.count; ++k) {
        gradient[s][m.source[k]] = m.share[k] * (grad_share[s][k] - mean);
      }
    }
    for (int s = 0; args.grad_scores && s < S; ++s) {
      memcpy(args.grad_scores + (b * S + s) * N, gradient[s], N * sizeof(float));
    }
    const int P = args.peers;
    const int64_t D = args.width, first = b * P * D;
    for (int p = 0; p < P; ++p) {
      for (int64_t d = 0; args.grad_query && d < D; ++d) {
        float total = 0;
        for (int n = 0; n < P; ++n) total += gradient[p][n] * args.key[first + n * D + d];
        args.grad_query[first + p * D + d] = total;
      }
      for (int64_t d = 0; args.grad_key && d < D; ++d) {
        float total = 0;
        for (int n = 0; n < P; ++n) total += gradient[n][p] * args.query[first + n * D + d];
        args.grad_key[first + p * D + d] = total;
      }
    }
  }
};

}  // namespace
}  // namespace fastokd
