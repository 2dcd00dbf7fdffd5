// The operators mixture_distillation and peer_attention_distillation of the CPU, as functions: what
// their schemas in ops/_mixture_op.py say.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace fastokd {

using OptionalTensor = std::optional<at::Tensor>;
// total, ce_S, kd_S, and the gradients that were asked for.
using LossAndGradients =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

LossAndGradients mixture_distillation(
    const at::Tensor& logits_SBC, const OptionalTensor& extra_EBC, const at::Tensor& labels,
    const at::Tensor& scores, const OptionalTensor& ce_weight_S, const OptionalTensor& kd_weight_S,
    const OptionalTensor& mixture_ce_weight_S, const OptionalTensor& temperature_0d,
    double ce_weight, double kd_weight, double mixture_ce_weight, double temperature,
    std::string_view mix, bool detach_targets, double label_smoothing, bool grad_logits,
    bool grad_extra, bool grad_scores);

LossAndGradients peer_attention_distillation(
    const at::Tensor& logits_SBC, const at::Tensor& labels, const at::Tensor& query_BPd,
    const at::Tensor& key_BPd, const OptionalTensor& ce_weight_S, const OptionalTensor& kd_weight_S,
    const OptionalTensor& temperature_0d, double ce_weight, double kd_weight, double temperature,
    std::string_view mix, bool detach_targets, double label_smoothing, bool grad_logits,
    bool grad_query, bool grad_key);

}  // namespace fastokd
