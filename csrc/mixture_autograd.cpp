// mixture_loss and peer_attention_loss: the fused losses as an eager step on the CPU calls them,
// with their gradients, in one call from Python. It refuses what the checks of ops/X.py refuse, so
// that they are made only where it does.
#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <cmath>
#include <initializer_list>
#include <tuple>

#include "mixture_op.h"

namespace fastokd {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Loss = std::tuple<Tensor, Tensor, Tensor>;

// saved * incoming, multiplied in float. `saved` isn't there afterwards unless the graph is kept.
Tensor scaled(const Tensor& saved, const Tensor& incoming, at::ScalarType type) {
  if (at::isTensorSubclassLike(incoming)) return at::mul(saved.to(at::kFloat), incoming).to(type);
  const bool reusable =
      saved.scalar_type() == type && !torch::autograd::get_current_graph_task_keep_graph();
  // The total is float, on the CPU, and so is its gradient.
  if (reusable && *incoming.const_data_ptr<float>() == 1.0f) return saved;
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

// The gradients came with the loss: only the incoming one is left to multiply them with.
struct FusedLoss : torch::autograd::Function<FusedLoss> {
  // A leaf that doesn't ask isn't there.
  static Tensor forward(AutogradContext* ctx, const OptionalTensor& first,
                        const OptionalTensor& second, const OptionalTensor& third,
                        LossAndGradients& results) {
    auto& [total, ce_S, kd_S, grad_0, grad_1, grad_2] = results;
    ctx->save_for_backward({std::move(grad_0), std::move(grad_1), std::move(grad_2)});
    int64_t types = 0;
    for (const OptionalTensor* leaf : {&third, &second, &first}) {
      types = types << 8 | int64_t(*leaf ? (*leaf)->scalar_type() : kNone);
    }
    ctx->saved_data["types"] = types;
    ctx->set_materialize_grads(false);
    return total;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& incoming) {
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

bool asks(const Tensor& x) { return x.requires_grad() && at::GradMode::is_enabled(); }

// The loss, with a history where one of the leaves asks.
Loss carry(LossAndGradients&& results, const OptionalTensor& first, const OptionalTensor& second,
           const OptionalTensor& third) {
  auto& [total, ce_S, kd_S, grad_0, grad_1, grad_2] = results;
  if (first || second || third) {
    total = FusedLoss::apply(first, second, third, results);
  }
  return {std::move(total), std::move(ce_S), std::move(kd_S)};
}

OptionalTensor where(bool asked, const Tensor& leaf) {
  return asked ? OptionalTensor(leaf) : std::nullopt;
}

void check_options(std::initializer_list<const Tensor*> inputs,
                   std::initializer_list<const OptionalTensor*> weights, const Tensor& labels,
                   double temperature, double label_smoothing) {
  for (const Tensor* x : inputs) {
    TORCH_CHECK((x->key_set() & at::kTensorSubclassLike).empty(), "an input is more than a tensor");
    TORCH_CHECK(x->scalar_type() != at::kDouble, "an input is double: it computes in float");
  }
  for (const OptionalTensor* x : weights) {
    TORCH_CHECK(!*x || !(*x)->requires_grad(), "a weight or the temperature asks for gradient");
  }
  TORCH_CHECK(!labels.requires_grad(), "labels ask for gradient");
  TORCH_CHECK(std::isfinite(temperature) && temperature > 0, "temperature is ", temperature);
  TORCH_CHECK(label_smoothing >= 0 && label_smoothing < 1, "label_smoothing is ", label_smoothing);
}

// Straight to the function, unless somebody watches what is dispatched.
template <auto function, class... Args>
LossAndGradients below_autograd(const char* name, const Args&... args) {
  at::AutoDispatchBelowADInplaceOrView below;
  if (!c10::impl::TorchDispatchModeTLS::any_modes_set()) return function(args...);
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(name, "")
      .typed<std::remove_pointer_t<decltype(function)>>()
      .call(args...);
}

Loss mixture_loss(const Tensor& logits_SBC, const OptionalTensor& extra_EBC, const Tensor& labels,
                  const Tensor& scores, const OptionalTensor& ce_weight_S,
                  const OptionalTensor& kd_weight_S, const OptionalTensor& mixture_ce_weight_S,
                  const OptionalTensor& temperature_0d, double ce_weight, double kd_weight,
                  double mixture_ce_weight, double temperature, std::string_view mix,
                  bool detach_targets, double label_smoothing) {
  const Tensor extra = extra_EBC.value_or(Tensor());
  check_options({&logits_SBC, &scores, extra.defined() ? &extra : &scores},
                {&ce_weight_S, &kd_weight_S, &mixture_ce_weight_S, &temperature_0d}, labels,
                temperature, label_smoothing);
  const bool to_targets = !detach_targets || mixture_ce_weight_S || mixture_ce_weight != 0;
  const bool of_logits = asks(logits_SBC), of_scores = to_targets && asks(scores),
             of_extra = to_targets && extra.defined() && asks(extra);
  return carry(below_autograd<mixture_distillation>(
                   "fastokd::mixture_distillation", logits_SBC, extra_EBC, labels, scores,
                   ce_weight_S, kd_weight_S, mixture_ce_weight_S, temperature_0d, ce_weight,
                   kd_weight, mixture_ce_weight, temperature, mix, detach_targets, label_smoothing,
                   of_logits, of_extra, of_scores),
               where(of_logits, logits_SBC), where(of_extra, extra), where(of_scores, scores));
}

Loss peer_attention_loss(const Tensor& logits_SBC, const Tensor& labels, const Tensor& query_BPd,
                         const Tensor& key_BPd, const OptionalTensor& ce_weight_S,
                         const OptionalTensor& kd_weight_S, const OptionalTensor& temperature_0d,
                         double ce_weight, double kd_weight, double temperature,
                         std::string_view mix, bool detach_targets, double label_smoothing) {
  check_options({&logits_SBC, &query_BPd, &key_BPd}, {&ce_weight_S, &kd_weight_S, &temperature_0d},
                labels, temperature, label_smoothing);
  const bool of_logits = asks(logits_SBC), of_query = !detach_targets && asks(query_BPd),
             of_key = !detach_targets && asks(key_BPd);
  return carry(below_autograd<peer_attention_distillation>(
                   "fastokd::peer_attention_distillation", logits_SBC, labels, query_BPd, key_BPd,
                   ce_weight_S, kd_weight_S, temperature_0d, ce_weight, kd_weight, temperature, mix,
                   detach_targets, label_smoothing, of_logits, of_query, of_key),
               where(of_logits, logits_SBC), where(of_query, query_BPd), where(of_key, key_BPd));
}

}  // namespace
}  // namespace fastokd

TORCH_LIBRARY_IMPL(fastokd, CompositeImplicitAutograd, m) {
  m.impl("mixture_loss", &fastokd::mixture_loss);
  m.impl("peer_attention_loss", &fastokd::peer_attention_loss);
}
