// The dispatcher's side of mixture_distillation and peer_attention_distillation: checks, threads
// and the sums over the batch. The schema and its conventions are in ops/fused_loss.py.
#include "mixture_distillation_kernel.h"

#include <cstdlib>
#include <string_view>
#include <vector>

#include "op.h"

namespace fastokd {
namespace {

using OptionalTensor = optional<Tensor>;

Tensor as_float(const Tensor& x, const char* name) {
  TORCH_CHECK(x.device().is_cpu() && x.layout() == at::kStrided, name, " is on ", x.device(),
              " with layout ", x.layout(), ": it must be a dense CPU tensor");
  TORCH_CHECK(x.is_floating_point(), name, " is ", x.scalar_type(), ": it must be floating point");
  return x.scalar_type() == at::kFloat ? x : x.to(at::kFloat);
}

SourceRows rows_of(const Tensor& x, const char* name) {
  const Type type = type_of(x, name);
  TORCH_CHECK(x.dim() == 3, name, " has ", x.dim(), " dimensions: it must have 3");
  TORCH_CHECK(x.stride(2) == 1 || x.size(2) <= 1, name, " has stride ", x.stride(2),
              " between classes: it must be 1");
  return {x.const_data_ptr(), x.stride(0), x.stride(1), type};
}

// Memory for a gradient in rows of classes: of float16 in float32, otherwise in its own type.
Tensor row_gradient(const Tensor& x, void*& data, Type& type) {
  const auto scalar = x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type();
  Tensor gradient(at::detail::empty_cpu(x.sizes(), scalar));
  data = gradient.mutable_data_ptr();
  type = type_of(gradient, "gradient");
  return gradient;
}

Tensor float_gradient(at::IntArrayRef shape, float*& data) {
  Tensor gradient = new_float(shape);
  data = gradient.mutable_data_ptr<float>();
  return gradient;
}

void read_weight(float* to, const OptionalTensor& tensor, double number, int64_t S,
                 const char* name) {
  std::fill(to, to + S, float(number));
  if (!tensor) return;
  const Tensor values = as_float(*tensor, name);
  TORCH_CHECK(values.dim() == 0 || (values.dim() == 1 && values.size(0) == S), name, " has shape ",
              values.sizes(), ": it must be a scalar or [", S, "]");
  const float* from = values.const_data_ptr<float>();
  const int64_t stride = values.dim() ? values.stride(0) : 0;
  for (int64_t s = 0; s < S; ++s) to[s] *= from[s * stride];
}

Mix mix_of(std::string_view mix) {
  if (mix == "logits") return Mix::kLogits;
  if (mix == "probs") return Mix::kProbs;
  TORCH_CHECK(mix == "pairwise", "mix is ", mix, ": logits, probs or pairwise");
  return Mix::kPairwise;
}

// Memory that a thread keeps from call to call; freed when it ends.
struct Scratch {
  float* data = nullptr;
  int64_t floats = 0;

  float* take(int64_t wanted) {
    if (wanted > floats) {
      std::free(data);
      data = static_cast<float*>(std::aligned_alloc(64, size_t(wanted) * sizeof(float)));
      floats = data ? wanted : 0;
      TORCH_CHECK(data, "no memory for ", wanted, " floats");
    }
    return data;
  }
  ~Scratch() { std::free(data); }
};

// What follows fills a Loss; the tensors returned must live as long as it.
Tensor read_ids(const int64_t*& data, const Tensor& labels, const char* name) {
  TORCH_CHECK(at::isIntegralType(labels.scalar_type(), false), name, " is ", labels.scalar_type(),
              ": class ids must be integers");
  const bool wide = labels.scalar_type() == at::kLong;
  const Tensor ids = (wide ? labels : labels.to(at::kLong)).contiguous();
  data = ids.const_data_ptr<int64_t>();
  return ids;
}

Tensor read_labels(Loss& loss, const Tensor& labels) {
  const int64_t B = loss.batch, C = loss.classes;
  TORCH_CHECK(labels.device().is_cpu() && labels.layout() == at::kStrided,
              "labels_B must be a dense CPU tensor");
  const bool hard = labels.dim() == 1;
  TORCH_CHECK(labels.dim() > 0 && labels.size(0) == B &&
                  (hard || (labels.dim() == 2 && labels.size(1) == C)),
              "labels_B has shape ", labels.sizes(), ": it must be [", B, "] or [", B, ", ", C, "]");
  if (hard) return read_ids(loss.labels, labels, "labels_B");
  const Tensor soft = as_float(labels, "labels_B").contiguous();
  loss.soft_labels = soft.const_data_ptr<float>();
  return soft;
}

Tensor read_samples(const Loss& loss, const float*& data, const Tensor& x, const char* name) {
  const Tensor values = as_float(x, name).contiguous();
  TORCH_CHECK(values.dim() == 1 && values.size(0) == loss.batch, name, " has shape ", x.sizes(),
              ": it must be [", loss.batch, "]");
  data = values.const_data_ptr<float>();
  return values;
}

Tensor read_labels2(Loss& loss, const Tensor& labels2) {
  TORCH_CHECK(!loss.soft_labels, "labels2_B mixes class ids, and labels_B has none");
  TORCH_CHECK(labels2.device().is_cpu() && labels2.layout() == at::kStrided,
              "labels2_B must be a dense CPU tensor");
  TORCH_CHECK(labels2.dim() == 1 && labels2.size(0) == loss.batch, "labels2_B has shape ",
              labels2.sizes(), ": it must be [", loss.batch, "]");
  return read_ids(loss.labels2, labels2, "labels2_B");
}

Tensor read_scores(Loss& loss, const Tensor& scores) {
  const int64_t S = loss.students, N = S + loss.extras, B = loss.batch;
  const Tensor values = as_float(scores, "scores");
  const bool batched = values.dim() == 3;
  TORCH_CHECK(batched ? values.sizes() == at::IntArrayRef({B, S, N})
                      : values.sizes() == at::IntArrayRef({S, N}),
              "scores has shape ", values.sizes(), ": it must be [", S, ", ", N, "] or [", B, ", ",
              S, ", ", N, "]");
  loss.scores = values.const_data_ptr<float>();
  loss.score_strides[0] = batched ? values.stride(0) : 0;
  loss.score_strides[1] = values.stride(batched);
  loss.score_strides[2] = values.stride(batched + 1);
  return values;
}

Tensor read_peers(Loss& loss, const Tensor& x, const char* name, const float*& data) {
  const int64_t S = loss.students, P = x.dim() == 3 ? x.size(1) : -1;
  TORCH_CHECK(P >= 1 && (P == S || P == S - 1) && x.size(0) == loss.batch, name, " has shape ",
              x.sizes(), ": it must be [", loss.batch, ", ", S, " or ", S - 1, ", width]");
  const Tensor values = as_float(x, name).contiguous();
  data = values.const_data_ptr<float>();
  loss.peers = int(P);
  loss.width = int(x.size(2));
  return values;
}

// In double and in the samples' order: the same whatever the number of threads.
std::tuple<Tensor, Tensor, Tensor> means(const Loss& loss) {
  const int64_t S = loss.students, B = loss.batch;
  Tensor ce_S = new_float({S}), kd_S = new_float({S});
  const float* weights[3] = {loss.ce_weight, loss.kd_weight, loss.mixture_weight};
  float* to[2] = {ce_S.mutable_data_ptr<float>(), kd_S.mutable_data_ptr<float>()};
  double total = 0;
  for (int term = 0; term < (loss.has_mixture_ce ? 3 : 2); ++term) {
    for (int64_t s = 0; s < S; ++s) {
      const float* losses_B = loss.losses + (term * S + s) * B;
      double lanes[4] = {};
      for (int64_t b = 0; b < B; ++b) lanes[b % 4] += losses_B[b];
      const double mean =
          (lanes[0] + lanes[1] + lanes[2] + lanes[3]) / double(std::max<int64_t>(B, 1));
      total += weights[term][s] * mean;
      if (term < 2) to[term][s] = float(mean);
    }
  }
  return {new_number(total), ce_S, kd_S};
}

// [B, S, N] to [S, N], in the samples' order.
Tensor sum_of_samples(const Tensor& x_BSN) {
  const int64_t B = x_BSN.size(0), S = x_BSN.size(1), N = x_BSN.size(2);
  Tensor sum_SN = new_float({S, N});
  double totals[kMaxSources * kMaxSources] = {};
  const float* from = x_BSN.const_data_ptr<float>();
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t i = 0; i < S * N; ++i) totals[i] += from[b * S * N + i];
  }
  std::copy(totals, totals + S * N, sum_SN.mutable_data_ptr<float>());
  return sum_SN;
}

// Where there is a key, `scores` are the queries. Returns the gradients that are asked for.
std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>> fused_loss(
    const Tensor& logits_SBC, const OptionalTensor& extra_EBC, const Tensor& labels_B,
    const Tensor& scores, const OptionalTensor& key_BPd, const OptionalTensor& ce_weight_S,
    const OptionalTensor& kd_weight_S, const OptionalTensor& mixture_ce_weight_S,
    const OptionalTensor& temperature_0d, double ce_weight, double kd_weight,
    double mixture_ce_weight, double temperature, std::string_view mix, bool detach_targets,
    double label_smoothing, bool grad_logits, bool grad_extra, bool grad_scores, bool grad_key,
    const OptionalTensor& labels2_B, const OptionalTensor& share2_B,
    const OptionalTensor& sample_weight_B) {
  Loss loss{};
  loss.logits = rows_of(logits_SBC, "logits_SBC");
  const int64_t S = logits_SBC.size(0), B = logits_SBC.size(1), C = logits_SBC.size(2);
  int64_t E = 0;
  if (extra_EBC) {
    loss.extra = rows_of(*extra_EBC, "extra_EBC");
    E = extra_EBC->size(0);
    TORCH_CHECK(extra_EBC->size(1) == B && extra_EBC->size(2) == C, "extra_EBC has shape ",
                extra_EBC->sizes(), ": it must be [extras, ", B, ", ", C, "]");
  }
  TORCH_CHECK(S >= 1 && C >= 1 && S + E <= kMaxSources, "logits_SBC has shape ",
              logits_SBC.sizes(), " and there are ", E, " extras: from 1 to ", kMaxSources,
              " sources, and a class");
  loss.students = int(S), loss.extras = int(E), loss.batch = B, loss.classes = C;
  const Tensor labels = read_labels(loss, labels_B);
  loss.smoothing = float(label_smoothing);
  TORCH_CHECK(labels2_B.has_value() == share2_B.has_value(),
              "labels2_B and share2_B must be given together");
  Tensor labels2, share2, sample_weight;
  if (labels2_B) {
    labels2 = read_labels2(loss, *labels2_B);
    share2 = read_samples(loss, loss.share2, *share2_B, "share2_B");
  }
  if (sample_weight_B) {
    sample_weight = read_samples(loss, loss.sample_weight, *sample_weight_B, "sample_weight_B");
  }
  read_weight(loss.ce_weight, ce_weight_S, ce_weight, S, "ce_weight_S");
  read_weight(loss.kd_weight, kd_weight_S, kd_weight, S, "kd_weight_S");
  read_weight(loss.mixture_weight, mixture_ce_weight_S, mixture_ce_weight, S,
              "mixture_ce_weight_S");
  loss.has_mixture_ce = mixture_ce_weight_S || mixture_ce_weight != 0;
  TORCH_CHECK(!temperature_0d || temperature_0d->dim() == 0, "temperature_0d must be a scalar");
  read_weight(&loss.temperature, temperature_0d, temperature, 1, "temperature_0d");
  loss.mix = mix_of(mix);
  loss.detach_targets = detach_targets;

  std::vector<Tensor> gradients;
  if (grad_logits) {
    gradients.push_back(row_gradient(logits_SBC, loss.grad_logits, loss.grad_logits_type));
  }
  if (grad_extra && extra_EBC) {
    gradients.push_back(row_gradient(*extra_EBC, loss.grad_extra, loss.grad_extra_type));
  }
  Tensor values, key;
  if (key_BPd) {
    TORCH_CHECK(!extra_EBC, "peers' queries and keys score no extras: extra_EBC must be None");
    values = read_peers(loss, scores, "query_BPd", loss.query);
    key = read_peers(loss, *key_BPd, "key_BPd", loss.key);
    TORCH_CHECK(values.sizes() == key.sizes(), "query_BPd and key_BPd differ in shape: ",
                values.sizes(), " and ", key.sizes());
    if (grad_scores) gradients.push_back(float_gradient(scores.sizes(), loss.grad_query));
    if (grad_key) gradients.push_back(float_gradient(key_BPd->sizes(), loss.grad_key));
  } else {
    values = read_scores(loss, scores);
    if (grad_scores) gradients.push_back(float_gradient({B, S, S + E}, loss.grad_scores));
  }

  static thread_local Scratch losses;
  loss.losses = losses.take((3 * S * B + 15) / 16 * 16);
  const int64_t floats = mixture_distillation_scratch(loss);
  const auto range = FASTOKD_DISPATCH(mixture_distillation_range);
  // A thread takes enough samples to be worth waking.
  parallel(B, std::max<int64_t>(1, 8192 / (C * (S + E))), [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    range(loss, begin, end, scratch.take(floats));
  });
  if (grad_scores && scores.dim() == 2) gradients.back() = sum_of_samples(gradients.back());
  auto [total, ce_S, kd_S] = means(loss);
  return {total, ce_S, kd_S, gradients};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastokd, CPU, m) {
  m.impl("mixture_distillation", &fused_loss);
  m.impl("peer_attention_distillation", &fused_loss);
}

}  // namespace fastokd
