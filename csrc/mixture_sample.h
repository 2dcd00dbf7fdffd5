// One sample of mixture_distillation: its rows in scratch memory, its labels, its mixing weights.
#pragma once

#include "mixture_distillation_kernel.h"
#include "rows.h"

namespace fastokd {
namespace {

// The sources of a student, or the students that have a source, with the mixing weights.
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
  const Loss& loss;
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
  // Of source n and student s, in this order: a_sn, 0 where s doesn't listen, and whether it does;
  // where it does also log a_sn, D_sn and d total / d a_sn.
  float share[kMaxSources][kMaxSources], hears[kMaxSources][kMaxSources];
  float log_share[kMaxSources][kMaxSources], pair_mean[kMaxSources][kMaxSources];
  float grad_share[kMaxSources][kMaxSources];
  float has_target[kMaxSources];
  // -1: soft labels, no second label, or an id out of range.
  int64_t label, label2;
  float label_share, label2_share;  // of the labels, without smoothing; with the sample's weight
  float label_weight;               // the sample's
  float label_mass;  // the sum of the smoothed labels; NaN where an id that counts is out of range

  Sample(const Loss& a, float* scratch, int64_t index)
      : loss(a),
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

  static bool is_set(float mask) {
    int32_t bits;
    memcpy(&bits, &mask, sizeof bits);
    return bits;
  }

  float& term(int which, int s) const { return loss.losses[(which * S + s) * loss.batch + b]; }
  float kd_scale(int s) const { return loss.kd_weight[s] * T * per_sample; }

  void read_label() {
    label = label2 = -1;
    label_mass = label_weight = loss.sample_weight ? loss.sample_weight[b] : 1.0f;
    label2_share = loss.labels2 ? loss.share2[b] : 0.0f;
    label_share = 1.0f - label2_share;
    if (!loss.labels) {
      label_mass *= (1.0f - loss.smoothing) * row_sum(loss.soft_labels + b * C, C) + loss.smoothing;
    } else {
      label = class_id(loss.labels[b], label_share);
      if (loss.labels2) label2 = class_id(loss.labels2[b], label2_share);
    }
    label_share *= label_weight;
    label2_share *= label_weight;
  }

  // The id, or -1 where it is out of range: then all is NaN if its share isn't 0.
  int64_t class_id(int64_t id, float share) {
    if (id >= 0 && id < C) return id;
    if (share != 0.0f) label_mass = kNan;
    return -1;
  }

  float score(int s, int n) const {
    const int P = loss.peers;
    if (!P) {  // not loss.query, which is null for queries of width 0
      const int64_t* stride = loss.score_strides;
      return loss.scores[b * stride[0] + s * stride[1] + n * stride[2]];
    }
    if (n >= P) return -kInfinity;  // the leader is no source,
    if (s >= P) return 0.0f;        // and weighs every peer alike
    return row_dot(loss.query + (b * P + s) * loss.width, loss.key + (b * P + n) * loss.width,
                   loss.width);
  }

  // The shares: softmax over sources, students side by side in a vector.
  void read_scores() {
    float scores[kMaxSources][kMaxSources];
    for (int n = 0; n < N; ++n) {
      for (int s = 0; s < S; s += kLanes) store(scores[n] + s, Vec{});
      for (int s = 0; s < S; ++s) scores[n][s] = score(s, n);
    }
    for (int s = 0; s < S; s += kLanes) {
      Vec top = splat(-kInfinity), total{};
      for (int n = 0; n < N; ++n) top = max(load(scores[n] + s), top);
      for (int n = 0; n < N; ++n) {
        const Vec score = load(scores[n] + s);
        // A NaN score makes all of its student's shares NaN.
        const VecInt silent = score == splat(-kInfinity);
        const Vec power = exp(select(silent, splat(kPadding), score - top));
        store(share[n] + s, power);
        store(hears[n] + s, as_float(~silent));
        total += power;
      }
      const Vec log_total = loss.mix == Mix::kProbs ? log(total) : Vec{};
      const VecInt nobody = total == Vec{};
      for (int n = 0; n < N; ++n) {
        store(share[n] + s, select(nobody, Vec{}, load(share[n] + s) / total));
        store(log_share[n] + s, load(scores[n] + s) - top - log_total);
        store(grad_share[n] + s, Vec{});
      }
      store(has_target + s, as_float(~nobody));
    }
  }

  void read_links() {
    for (int n = 0; n < N; ++n) sources[n].count = listeners[n].count = 0;
    for (int n = 0; n < N; ++n) {
      for (int s = 0; s < S; ++s) {
        if (!is_set(hears[n][s])) continue;
        sources[s].add(n, share[n][s]);
        listeners[n].add(s, share[n][s]);
      }
    }
  }

  // CE to the sample's labels of the softmax of a row whose log of the sum of powers is `log_sum`.
  float cross_entropy(const float* row, float log_sum) const {
    const float keep = 1.0f - loss.smoothing;
    float ce = label_mass * log_sum;
    if (label >= 0) ce -= keep * label_share * row[label];
    if (label2 >= 0) ce -= keep * label2_share * row[label2];
    if (!loss.labels) ce -= keep * label_weight * row_dot(loss.soft_labels + b * C, row, C);
    if (loss.smoothing > 0) ce -= loss.smoothing / float(C) * label_weight * row_sum(row, C);
    return ce;
  }

  // gradient -= weight * smoothed labels
  void subtract_labels(float* gradient, float weight) const {
    const float keep = weight * (1.0f - loss.smoothing);
    if (label >= 0) gradient[label] -= keep * label_share;
    if (label2 >= 0) gradient[label2] -= keep * label2_share;
    if (loss.labels && loss.smoothing == 0) return;
    const float* soft = loss.labels ? nullptr : loss.soft_labels + b * C;
    const float each = weight * loss.smoothing / float(C) * label_weight;
    const float per_soft = keep * label_weight;
    for (int64_t c = 0; c < C; ++c) gradient[c] -= each + (soft ? per_soft * soft[c] : 0.0f);
  }

  // From the gradient in the shares, that in the scores; then in the queries and keys.
  void write_scores() {
    float gradient[kMaxSources][kMaxSources];
    for (int s = 0; s < S; s += kLanes) {
      Vec mean{};
      for (int n = 0; n < N; ++n) {
        // A source at -inf gets 0 even where the others are NaN.
        const VecInt heard = as_int(load(hears[n] + s));
        const Vec value = load(share[n] + s) * load(grad_share[n] + s);
        mean += as_float(as_int(value) & heard);
      }
      for (int n = 0; n < N; ++n) {
        const Vec value = load(share[n] + s) * (load(grad_share[n] + s) - mean);
        store(gradient[n] + s, as_float(as_int(value) & as_int(load(hears[n] + s))));
      }
    }
    for (int s = 0; loss.grad_scores && s < S; ++s) {
      for (int n = 0; n < N; ++n) loss.grad_scores[(b * S + s) * N + n] = gradient[n][s];
    }
    const int P = loss.peers;
    const int64_t D = loss.width, first = b * P * D;
    for (int p = 0; p < P; ++p) {
      const float *keys[kMaxSources], *queries[kMaxSources];
      float of_query[kMaxSources];
      for (int n = 0; n < P; ++n) {
        keys[n] = loss.key + first + n * D;
        queries[n] = loss.query + first + n * D;
        of_query[n] = gradient[n][p];
      }
      if (loss.grad_query) {
        row_mix(loss.grad_query + first + p * D, nullptr, keys, of_query, P, D, spare);
      }
      if (loss.grad_key) {
        row_mix(loss.grad_key + first + p * D, nullptr, queries, gradient[p], P, D, spare);
      }
    }
  }
};

}  // namespace
}  // namespace fastokd
