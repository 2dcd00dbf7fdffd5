// One sample of mixture_distillation: its rows in scratch memory, its labels, who listens to whom.
#pragma once

#include "mixture_distillation_kernel.h"
#include "rows.h"

namespace fastokd {
namespace {

// The sources of a student, or the students that listen to a source, and how much.
struct Links {
  int count;
  int other[kMaxSources];
  float share[kMaxSources];

  void add(int to, float how_much) {
    other[count] = to;
    share[count++] = how_much;
  }
};

struct Sample {
  const MixtureArgs& args;
  const int64_t b, C, length;
  const int S, N;
  const float T, scale, per_sample;  // temperature, 1 / T, 1 / B
  const bool by_source;              // each source has its softmax; otherwise the mixture has one
  const bool asks_gradient, asks_scores;
  const bool through_mixed;  // gradient reaches the sources through the mixed logits

  // Scratch rows. z: logits less their maximum; e: e^z, then the gradient in z; q: e^(z / T);
  // mixed: mixed logits, then the gradient in them; target: as q, of them, or mixed probabilities;
  // r: log t - log q, of mixed probabilities; powers: as e, of the mixed logits.
  float *z[kMaxSources], *e[kMaxSources], *q[kMaxSources];
  float *mixed[kMaxSources], *target[kMaxSources], *r[kMaxSources], *powers[kMaxSources];
  float *spare, *unused;

  float sum_e[kMaxSources], log_e[kMaxSources], sum_q[kMaxSources], log_q[kMaxSources];
  Links sources[kMaxSources], listeners[kMaxSources];
  // Of source n and student s that listens to it, in this order: log a_sn, D_sn, d total / d a_sn.
  float log_share[kMaxSources][kMaxSources], pair_mean[kMaxSources][kMaxSources];
  float grad_share[kMaxSources][kMaxSources];
  int64_t label;                               // -1: soft labels, or an id out of range
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
        asks_scores(a.grad_scores || a.grad_query || a.grad_key),
        through_mixed((!by_source && !a.detach_targets) || a.has_mixture_ce) {
    auto next = [&] {
      float* row = scratch;
      scratch += length;
      return row;
    };
    spare = next(), unused = next();
    for (int n = 0; n < N; ++n) z[n] = next(), e[n] = next(), q[n] = next();
    for (int s = 0; s < S; ++s) {
      mixed[s] = next(), target[s] = next(), r[s] = next(), powers[s] = next();
    }
    read_label();
    read_scores();
  }

  float& loss(int term, int s) const { return args.losses[(term * S + s) * args.batch + b]; }
  float kd_scale(int s) const { return args.kd_weight[s] * T * per_sample; }

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

  // The shares: softmax over sources, students side by side in a vector.
  void read_scores() {
    float scores[kMaxSources][kMaxSources], shares[kMaxSources][kMaxSources];
    for (int n = 0; n < N; ++n) {
      for (int s = 0; s < S; s += kLanes) store(scores[n] + s, Vec{});
      for (int s = 0; s < S; ++s) scores[n][s] = score(s, n);
      sources[n].count = listeners[n].count = 0;
    }
    for (int s = 0; s < S; s += kLanes) {
      Vec top = splat(-kInfinity), total{};
      for (int n = 0; n < N; ++n) top = max(load(scores[n] + s), top);
      for (int n = 0; n < N; ++n) {
        const Vec score = load(scores[n] + s);
        // A NaN is heard, and makes all of its student's shares NaN.
        const Vec share = exp(select(score == splat(-kInfinity), splat(kPadding), score - top));
        store(shares[n] + s, share);
        total += share;
      }
      const Vec log_total = args.mix == Mix::kProbs ? log(total) : Vec{};
      for (int n = 0; n < N; ++n) {
        store(shares[n] + s, load(shares[n] + s) / total);
        store(log_share[n] + s, load(scores[n] + s) - top - log_total);
      }
    }
    for (int n = 0; n < N; ++n) {
      for (int s = 0; s < S; ++s) {
        grad_share[n][s] = 0.0f;
        if (scores[n][s] == -kInfinity) continue;
        sources[s].add(n, shares[n][s]);
        listeners[n].add(s, shares[n][s]);
      }
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

  // From the gradient in the shares, that in the scores; then in the queries and keys.
  void write_scores() const {
    float gradient[kMaxSources][kMaxSources];
    for (int s = 0; s < S; ++s) {
      const Links& heard = sources[s];
      float mean = 0;
      for (int k = 0; k < heard.count; ++k) mean += heard.share[k] * grad_share[heard.other[k]][s];
      for (int n = 0; n < N; ++n) gradient[s][n] = 0.0f;
      for (int k = 0; k < heard.count; ++k) {
        const int n = heard.other[k];
        gradient[s][n] = heard.share[k] * (grad_share[n][s] - mean);
      }
      float* to = args.grad_scores + (b * S + s) * N;
      for (int n = 0; args.grad_scores && n < N; ++n) to[n] = gradient[s][n];
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
