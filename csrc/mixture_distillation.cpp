// The dispatcher's side of mixture_distillation and peer_attention_distillation: checks, threads
// and the sums over the batch. The schemas, and what they promise, are in ops/_mixture_op.py.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>

#include "capability.h"
#include "mixture_distillation_kernel.h"
#include "mixture_op.h"

namespace fastokd {
namespace {

using at::Tensor;

Type type_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case at::kFloat: return Type::kFloat;
    case at::kBFloat16: return Type::kBFloat16;
    case at::kHalf: return Type::kHalf;
    default: TORCH_CHECK(false, name, " is ", x.scalar_type(), ": float, bfloat16 or half here");
  }
}

void check_plain(const Tensor& x, const char* name) {
  TORCH_CHECK(x.device().is_cpu() && x.layout() == at::kStrided, name, " is on ", x.device(),
              " with layout ", x.layout(), ": it must be a dense CPU tensor");
}

Tensor as_float(const Tensor& x, const char* name) {
  check_plain(x, name);
  TORCH_CHECK(x.is_floating_point(), name, " is ", x.scalar_type(), ": it must be floating point");
  return x.scalar_type() == at::kFloat ? x : x.to(at::kFloat);
}

SourceRows rows_of(const Tensor& x, const char* name) {
  check_plain(x, name);
  TORCH_CHECK(x.dim() == 3, name, " has ", x.dim(), " dimensions: it must have 3");
  TORCH_CHECK(x.stride(2) == 1 || x.size(2) <= 1, name, " has stride ", x.stride(2),
              " between classes: it must be 1");
  return {x.const_data_ptr(), x.stride(0), x.stride(1), type_of(x, name)};
}

// Not through the dispatcher, which costs more than the memory does.
Tensor new_tensor(at::IntArrayRef shape, at::ScalarType type) {
  return Tensor(at::detail::empty_cpu(shape, type));
}

Tensor new_float(at::IntArrayRef shape) { return new_tensor(shape, at::kFloat); }

// For a half in float, otherwise in its own type.
Tensor row_gradient(const Tensor& x, bool asked, void*& data, Type& type) {
  if (!asked) return new_float({0});
  Tensor gradient =
      new_tensor(x.sizes(), x.scalar_type() == at::kHalf ? at::kFloat : x.scalar_type());
  data = gradient.mutable_data_ptr();
  type = type_of(gradient, "gradient");
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

// What both operators have in common; `hold` keeps converted inputs alive.
struct Call {
  MixtureArgs args{};
  Tensor total, ce_S, kd_S, hold[3];

  Call(const Tensor& logits_SBC, const OptionalTensor& extra_EBC, const Tensor& labels,
       const OptionalTensor& ce_weight_S, const OptionalTensor& kd_weight_S,
       const OptionalTensor& temperature_0d, double ce_weight, double kd_weight, double temperature,
       std::string_view mix, bool detach_targets, double label_smoothing) {
    args.logits = rows_of(logits_SBC, "logits_SBC");
    const int64_t S = logits_SBC.size(0), B = logits_SBC.size(1), C = logits_SBC.size(2);
    int64_t E = 0;
    if (extra_EBC) {
      args.extra = rows_of(*extra_EBC, "extra_EBC");
      E = extra_EBC->size(0);
      TORCH_CHECK(extra_EBC->size(1) == B && extra_EBC->size(2) == C, "extra_EBC has shape ",
                  extra_EBC->sizes(), ": it must be [extras, ", B, ", ", C, "]");
    }
    TORCH_CHECK(S >= 1 && C >= 1 && S + E <= kMaxSources, "logits_SBC has shape ",
                logits_SBC.sizes(), " and there are ", E, " extras: from 1 to ", kMaxSources,
                " sources, and a class");
    args.students = int(S), args.extras = int(E), args.batch = B, args.classes = C;
    read_labels(labels, B, C);
    args.smoothing = float(label_smoothing);
    read_weight(args.ce_weight, ce_weight_S, ce_weight, S, "ce_weight_S");
    read_weight(args.kd_weight, kd_weight_S, kd_weight, S, "kd_weight_S");
    TORCH_CHECK(!temperature_0d || temperature_0d->dim() == 0, "temperature_0d must be a scalar");
    read_weight(&args.temperature, temperature_0d, temperature, 1, "temperature_0d");
    args.mix = mix_of(mix);
    args.detach_targets = detach_targets;
    static thread_local Scratch losses;
    args.losses = losses.take((3 * S * B + 15) / 16 * 16);
  }

  void read_labels(const Tensor& labels, int64_t B, int64_t C) {
    check_plain(labels, "labels");
    const bool hard = labels.dim() == 1;
    TORCH_CHECK(labels.dim() > 0 && labels.size(0) == B && (hard || (labels.dim() == 2 && labels.size(1) == C)),
                "labels has shape ", labels.sizes(), ": it must be [", B, "] or [", B, ", ", C, "]");
    if (hard) {
      TORCH_CHECK(at::isIntegralType(labels.scalar_type(), false), "labels is ",
                  labels.scalar_type(), ": class ids must be integers");
      hold[0] = (labels.scalar_type() == at::kLong ? labels : labels.to(at::kLong)).contiguous();
      args.labels = hold[0].const_data_ptr<int64_t>();
    } else {
      hold[0] = as_float(labels, "labels").contiguous();
      args.soft_labels = hold[0].const_data_ptr<float>();
    }
  }

  Tensor dense(const Tensor& x, const char* name, int slot, int64_t P) {
    TORCH_CHECK(x.dim() == 3 && x.size(0) == args.batch && x.size(1) == P, name, " has shape ",
                x.sizes(), ": it must be [", args.batch, ", ", P, ", width]");
    return hold[slot] = as_float(x, name).contiguous();
  }

  // A thread takes enough samples to be worth waking.
  void run() {
    const int64_t floats = mixture_distillation_scratch(args);
    const int64_t per_sample = args.classes * (args.students + args.extras);
    const auto range = FASTOKD_DISPATCH(mixture_distillation_range);
    at::parallel_for(0, args.batch, std::max<int64_t>(1, 8192 / per_sample),
                     [&](int64_t begin, int64_t end) {
                       static thread_local Scratch scratch;
                       range(args, begin, end, scratch.take(floats));
                     });
    reduce();
  }

  // In double and in the samples' order: the same whatever the number of threads.
  void reduce() {
    const int64_t S = args.students, B = args.batch;
    total = new_float({}), ce_S = new_float({S}), kd_S = new_float({S});
    const float* weights[3] = {args.ce_weight, args.kd_weight, args.mixture_weight};
    Tensor* means[2] = {&ce_S, &kd_S};
    double sum = 0;
    for (int term = 0; term < (args.has_mixture_ce ? 3 : 2); ++term) {
      for (int64_t s = 0; s < S; ++s) {
        const float* losses_B = args.losses + (term * S + s) * B;
        double lanes[4] = {};
        for (int64_t b = 0; b < B; ++b) lanes[b % 4] += losses_B[b];
        const double mean =
            (lanes[0] + lanes[1] + lanes[2] + lanes[3]) / double(std::max<int64_t>(B, 1));
        sum += weights[term][s] * mean;
        if (term < 2) means[term]->mutable_data_ptr<float>()[s] = float(mean);
      }
    }
    *total.mutable_data_ptr<float>() = float(sum);
  }
};

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

}  // namespace

LossAndGradients mixture_distillation(
    const Tensor& logits_SBC, const OptionalTensor& extra_EBC, const Tensor& labels,
    const Tensor& scores, const OptionalTensor& ce_weight_S, const OptionalTensor& kd_weight_S,
    const OptionalTensor& mixture_ce_weight_S, const OptionalTensor& temperature_0d,
    double ce_weight, double kd_weight, double mixture_ce_weight, double temperature,
    std::string_view mix, bool detach_targets, double label_smoothing, bool grad_logits,
    bool grad_extra, bool grad_scores) {
  Call call(logits_SBC, extra_EBC, labels, ce_weight_S, kd_weight_S, temperature_0d, ce_weight,
            kd_weight, temperature, mix, detach_targets, label_smoothing);
  MixtureArgs& args = call.args;
  const int64_t S = args.students, N = S + args.extras, B = args.batch;
  read_weight(args.mixture_weight, mixture_ce_weight_S, mixture_ce_weight, S,
              "mixture_ce_weight_S");
  args.has_mixture_ce = mixture_ce_weight_S || mixture_ce_weight != 0;

  call.hold[1] = as_float(scores, "scores");
  const Tensor& values = call.hold[1];
  const bool batched = values.dim() == 3;
  TORCH_CHECK(batched ? values.sizes() == at::IntArrayRef({B, S, N})
                      : values.sizes() == at::IntArrayRef({S, N}),
              "scores has shape ", values.sizes(), ": it must be [", S, ", ", N, "] or [", B, ", ",
              S, ", ", N, "]");
  args.scores = values.const_data_ptr<float>();
  args.score_strides[0] = batched ? values.stride(0) : 0;
  args.score_strides[1] = values.stride(batched);
  args.score_strides[2] = values.stride(batched + 1);

  Tensor of_logits =
      row_gradient(logits_SBC, grad_logits, args.grad_logits, args.grad_logits_type);
  Tensor of_extra = row_gradient(extra_EBC ? *extra_EBC : logits_SBC, extra_EBC && grad_extra,
                                 args.grad_extra, args.grad_extra_type);
  Tensor of_scores = grad_scores ? new_float({B, S, N}) : new_float({0});
  if (grad_scores) args.grad_scores = of_scores.mutable_data_ptr<float>();
  call.run();
  if (grad_scores && !batched) of_scores = sum_of_samples(of_scores);
  return {call.total, call.ce_S, call.kd_S, of_logits, of_extra, of_scores};
}

LossAndGradients peer_attention_distillation(
    const Tensor& logits_SBC, const Tensor& labels, const Tensor& query_BPd,
    const Tensor& key_BPd, const OptionalTensor& ce_weight_S, const OptionalTensor& kd_weight_S,
    const OptionalTensor& temperature_0d, double ce_weight, double kd_weight, double temperature,
    std::string_view mix, bool detach_targets, double label_smoothing, bool grad_logits,
    bool grad_query, bool grad_key) {
  Call call(logits_SBC, std::nullopt, labels, ce_weight_S, kd_weight_S, temperature_0d, ce_weight,
            kd_weight, temperature, mix, detach_targets, label_smoothing);
  MixtureArgs& args = call.args;
  const int64_t S = args.students, P = query_BPd.dim() == 3 ? query_BPd.size(1) : -1;
  TORCH_CHECK(P >= 1 && (P == S || P == S - 1), "query_BPd has shape ", query_BPd.sizes(),
              ": its peers must be the ", S, " students, or all but the leader");
  args.query = call.dense(query_BPd, "query_BPd", 1, P).const_data_ptr<float>();
  args.key = call.dense(key_BPd, "key_BPd", 2, P).const_data_ptr<float>();
  TORCH_CHECK(query_BPd.sizes() == key_BPd.sizes(), "query_BPd and key_BPd differ in shape: ",
              query_BPd.sizes(), " and ", key_BPd.sizes());
  args.peers = int(P);
  args.width = int(query_BPd.size(2));

  Tensor of_logits =
      row_gradient(logits_SBC, grad_logits, args.grad_logits, args.grad_logits_type);
  Tensor of_query = grad_query ? new_float(query_BPd.sizes()) : new_float({0});
  Tensor of_key = grad_key ? new_float(key_BPd.sizes()) : new_float({0});
  if (grad_query) args.grad_query = of_query.mutable_data_ptr<float>();
  if (grad_key) args.grad_key = of_key.mutable_data_ptr<float>();
  call.run();
  return {call.total, call.ce_S, call.kd_S, of_logits, of_query, of_key};
}

}  // namespace fastokd

TORCH_LIBRARY_IMPL(fastokd, CPU, m) {
  m.impl("mixture_distillation", &fastokd::mixture_distillation);
  m.impl("peer_attention_distillation", &fastokd::peer_attention_distillation);
}
