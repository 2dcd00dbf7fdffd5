// Autograd of mixture_distillation and peer_attention_distillation on the CPU: what FusedLoss in
// ops/_mixture_op.py does, without a step through Python.
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <tuple>

namespace fastokd {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// saved * incoming, multiplied in float. `saved` isn't there afterwards unless the graph is kept.
Tensor scaled(const Tensor& saved, const Tensor& incoming, at::ScalarType type) {
  if (at::isTensorSubclassLike(incoming)) return at::mul(saved.to(at::kFloat), incoming).to(type);
  const bool reusable =
      saved.scalar_type() == type && !torch::autograd::get_current_graph_task_keep_graph();
  if (reusable && incoming.item<double>() == 1.0) return saved;
  // One-dimensional, so that it takes part in type promotion: the product is rounded once.
  const Tensor factor = incoming.reshape({1});
  if (reusable) return saved.mul_(factor);
  Tensor product = at::empty_like(saved, saved.options().dtype(type));
  return at::mul_out(product, saved, factor);
}

// From this gradient a further backward raises: by default it would count as constant.
Tensor differentiable_once(const Tensor& gradient) {
  const auto error = std::make_shared<torch::autograd::DelayedError>(
      "the fused loss has no second derivative: impl='torch' has", 1);
  Tensor leaf = gradient.detach();
  leaf.set_requires_grad(true);
  error->set_next_edges(torch::autograd::collect_next_edges(leaf));
  return (*error)({leaf})[0];
}

constexpr auto kNone = at::ScalarType::Undefined;

struct Carried : torch::autograd::Function<Carried> {
  static variable_list forward(AutogradContext* ctx, const OptionalTensor& first,
                               const OptionalTensor& second, const OptionalTensor& third,
                               const Six& results) {
    const auto& [total, ce_S, kd_S, grad_0, grad_1, grad_2] = results;
    ctx->save_for_backward({grad_0, grad_1, grad_2});
    int64_t types = 0;
    for (const OptionalTensor* leaf : {&third, &second, &first}) {
      types = types << 8 | int64_t(*leaf ? (*leaf)->scalar_type() : kNone);
    }
    ctx->saved_data["types"] = types;
    ctx->mark_non_differentiable({ce_S, kd_S, grad_0, grad_1, grad_2});
    ctx->set_materialize_grads(false);
    return {total, ce_S, kd_S, grad_0, grad_1, grad_2};
  }

  static variable_list backward(AutogradContext* ctx, variable_list incoming) {
    variable_list gradients(4);
    const variable_list saved = ctx->get_saved_variables();
    const int64_t types = ctx->saved_data["types"].toInt();
    size_t edge = 0;
    for (size_t i = 0; i < 3 && incoming[0].defined(); ++i) {
      const auto type = at::ScalarType(types >> (8 * i) & 0xff);
      if (type == kNone || !ctx->needs_input_grad(edge++)) continue;
      gradients[i] = scaled(saved[i], incoming[0], type);
      if (at::GradMode::is_enabled()) gradients[i] = differentiable_once(gradients[i]);
    }
    return gradients;
  }
};

// Calls the operator below autograd; carries its gradients where one of its leaves asks.
template <class Operator, class... Args>
Six carry(const Operator& op, const OptionalTensor& first, const OptionalTensor& second,
          const OptionalTensor& third, const Args&... args) {
  Six results = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return op.call(args...);
  }();
  auto asks = [](const OptionalTensor& x) { return x && x->requires_grad(); };
  if (!at::GradMode::is_enabled() || !(asks(first) || asks(second) || asks(third))) return results;
  const variable_list out = Carried::apply(first, second, third, results);
  return {out[0], out[1], out[2], out[3], out[4], out[5]};
}

template <class Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Six mixture_distillation(const Tensor& logits_SBC, const OptionalTensor& extra_EBC,
                         const Tensor& labels, const Tensor& scores,
                         const OptionalTensor& ce_weight_S, const OptionalTensor& kd_weight_S,
                         const OptionalTensor& mixture_ce_weight_S,
                         const OptionalTensor& temperature_0d, double ce_weight, double kd_weight,
                         double mixture_ce_weight, double temperature, std::string_view mix,
                         bool detach_targets, double label_smoothing, bool grad_logits,
                         bool grad_extra, bool grad_scores) {
  static const auto op = find<decltype(mixture_distillation)>("fastokd::mixture_distillation");
  auto leaf = [](bool asked, const OptionalTensor& x) { return asked ? x : OptionalTensor(); };
  return carry(op, leaf(grad_logits, logits_SBC), leaf(grad_extra, extra_EBC),
               leaf(grad_scores, scores), logits_SBC, extra_EBC, labels, scores, ce_weight_S,
               kd_weight_S, mixture_ce_weight_S, temperature_0d, ce_weight, kd_weight,
               mixture_ce_weight, temperature, mix, detach_targets, label_smoothing, grad_logits,
               grad_extra, grad_scores);
}

Six peer_attention_distillation(const Tensor& logits_SBC, const Tensor& labels,
                                const Tensor& query_BPd, const Tensor& key_BPd,
                                const OptionalTensor& ce_weight_S,
                                const OptionalTensor& kd_weight_S,
                                const OptionalTensor& temperature_0d, double ce_weight,
                                double kd_weight, double temperature, std::string_view mix,
                                bool detach_targets, double label_smoothing, bool grad_logits,
                                bool grad_query, bool grad_key) {
  static const auto op =
      find<decltype(peer_attention_distillation)>("fastokd::peer_attention_distillation");
  auto leaf = [](bool asked, const OptionalTensor& x) { return asked ? x : OptionalTensor(); };
  return carry(op, leaf(grad_logits, logits_SBC), leaf(grad_query, query_BPd),
               leaf(grad_key, key_BPd), logits_SBC, labels, query_BPd, key_BPd, ce_weight_S,
               kd_weight_S, temperature_0d, ce_weight, kd_weight, temperature, mix, detach_targets,
               label_smoothing, grad_logits, grad_query, grad_key);
}

}  // namespace
}  // namespace fastokd

TORCH_LIBRARY_IMPL(fastokd, AutogradCPU, m) {
  m.impl("mixture_distillation", &fastokd::mixture_distillation);
  m.impl("peer_attention_distillation", &fastokd::peer_attention_distillation);
}
