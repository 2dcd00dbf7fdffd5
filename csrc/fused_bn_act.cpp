// The dispatcher's side of fused_bn_act: shapes, threads, autograd. The loops and the equations
// are in fused_bn_act_kernel.
#include "fused_bn_act_kernel.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <numeric>
#include <vector>

#include "op.h"

namespace fastokd {
namespace {

using namespace bn_act;

// Rows in blocks whose bounds depend on the shape alone, so that a result does not depend on the
// number of threads: partial sums are of a block, and are added in the blocks' order.
struct Blocks {
  const Kernels* kernels;
  Rows all;
  int64_t step;   // rows of a block
  int64_t count;  // blocks

  explicit Blocks(const Tensor& x_BCHW) {
    const bool bf16 = x_BCHW.scalar_type() == at::kBFloat16;
    kernels = FASTOKD_DISPATCH(bn_act_kernels)(bf16 ? Type::kBFloat16 : Type::kFloat,
                                               capability() == Capability::kAvx512Bf16);
    constexpr int64_t kFew = 1 << 12, kMany = 1 << 15, kMost = 256;
    const int64_t channels = x_BCHW.size(1);
    const int64_t rows = x_BCHW.numel() / channels;
    all = {rows, channels, std::lcm(channels, kernels->tile)};
    // Of a small map too there are several.
    const int64_t elements = std::clamp(x_BCHW.numel() / 32, kFew, kMany);
    const int64_t least = std::clamp<int64_t>(rows / 32, 8, 128);
    step = std::max({elements / channels, least, (rows + kMost - 1) / kMost});
    const int64_t group = all.width / channels;
    step = (step + group - 1) / group * group;
    count = (rows + step - 1) / step;
  }

  // A block's first element.
  const void* at(const void* base, int64_t block) const {
    return base ? static_cast<const char*>(base) + offset(block) : nullptr;
  }
  void* at(void* base, int64_t block) const {
    return base ? static_cast<char*>(base) + offset(block) : nullptr;
  }
  int64_t offset(int64_t block) const { return block * step * all.channels * kernels->element; }

  // Calls body(block, its rows) for every block. A thread gets the same blocks each time, and the last
  // ones are most likely still in its cache, so a second pass goes `backwards`.
  template <class Body>
  void each(bool backwards, Body body) const {
    parallel(count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t block = backwards ? begin + end - 1 - i : i;
        Rows rows = all;
        rows.count = std::min(step, all.count - block * step);
        body(block, rows);
      }
    });
  }
};

// A channel's values side by side `width` times, as the kernels read them.
float* repeated(float* to, const float* from, const Rows& rows) {
  for (int64_t lane = 0; lane < rows.width; lane += rows.channels) {
    std::copy(from, from + rows.channels, to + lane);
  }
  return to;
}

void check_map(const Tensor& x, const char* name) {
  TORCH_CHECK(is_channels_last(x), "fused_bn_act: ", name, " must be a channels-last map");
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16,
              "fused_bn_act: ", name, " must be float32 or bfloat16, not ", x.scalar_type());
}

void check_channels(const Tensor& x, int64_t channels, const char* name) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous() && x.dim() == 1 &&
                  x.size(0) == channels,
              "fused_bn_act: ", name, " must be contiguous float32 of shape [", channels, "]");
}

void check_like(const Tensor& other, const Tensor& x, const char* name) {
  check_map(other, name);
  TORCH_CHECK(other.sizes() == x.sizes() && other.scalar_type() == x.scalar_type(),
              "fused_bn_act: ", name, " must have x's shape and dtype");
}

// What forward keeps for backward: rows of a [4, C] tensor.
enum Stat { kMean, kInvStd, kScale, kShift, kStats };

// Means as plain sums, for channels whose mean is not finite: they are infinite or NaN as PyTorch's
// running_mean is.
template <class T>
void plain_means(const Tensor& x, double* mean, int64_t channels) {
  std::fill(mean, mean + channels, 0.0);
  const T* p = x.const_data_ptr<T>();
  const int64_t rows = x.numel() / channels;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < channels; ++c) mean[c] += static_cast<float>(p[i * channels + c]);
  }
  for (int64_t c = 0; c < channels; ++c) mean[c] /= static_cast<double>(rows);
}

// Each channel's mean and sum of squared deviations: of each block, then merged (Chan, Golub and
// LeVeque) in double.
void statistics(const Blocks& blocks, const Tensor& x, double* mean, double* m2) {
  const int64_t C = blocks.all.channels;
  std::vector<double> parts(2 * C * blocks.count);
  blocks.each(false, [&](int64_t block, Rows rows) {
    std::vector<float> scratch(2 * rows.width);
    double* part = parts.data() + 2 * C * block;
    blocks.kernels->stats(rows, blocks.at(x.const_data_ptr(), block), scratch.data(), part,
                          part + C);
  });
  std::copy(parts.begin(), parts.begin() + C, mean);
  std::copy(parts.begin() + C, parts.begin() + 2 * C, m2);
  for (int64_t block = 1; block < blocks.count; ++block) {
    const double seen = static_cast<double>(block * blocks.step);
    const double count = std::min<double>(blocks.step, blocks.all.count - seen);
    const double share = count / (seen + count);
    const double* part = parts.data() + 2 * C * block;
    for (int64_t c = 0; c < C; ++c) {
      const double step = part[c] - mean[c];
      mean[c] += step * share;
      m2[c] += part[C + c] + step * step * (seen * share);
    }
  }
  if (!std::all_of(mean, mean + C, [](double m) { return std::isfinite(m); })) {
    if (x.scalar_type() == at::kBFloat16) {
      plain_means<at::BFloat16>(x, mean, C);
    } else {
      plain_means<float>(x, mean, C);
    }
  }
}

Tensor normalise(const Blocks& blocks, const Tensor& x, const optional<Tensor>& residual,
                 const float* scale, const float* shift, bool relu) {
  Tensor y = at::empty_like(x);
  std::vector<float> lanes(2 * blocks.all.width);
  const Affine affine = {nullptr, repeated(lanes.data(), scale, blocks.all),
                         repeated(lanes.data() + blocks.all.width, shift, blocks.all)};
  const void* const add = residual ? residual->const_data_ptr() : nullptr;
  void* const to = y.mutable_data_ptr();
  blocks.each(true, [&](int64_t block, Rows rows) {
    blocks.kernels->normalise(rows, blocks.at(x.const_data_ptr(), block), blocks.at(add, block),
                              blocks.at(to, block), affine, relu);
  });
  return y;
}

// y, the stats, and no bits of the ReLU's mask, which only the Triton form keeps.
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight,
                                           const Tensor& bias, Tensor running_mean,
                                           Tensor running_var,
                                           optional<Tensor> num_batches_tracked,
                                           const optional<Tensor>& residual, bool relu,
                                           double momentum, double eps) {
  check_map(x, "x");
  const int64_t C = x.size(1);
  TORCH_CHECK(x.numel() > C, "fused_bn_act: more than one value a channel is needed");
  check_channels(weight, C, "weight");
  check_channels(bias, C, "bias");
  check_channels(running_mean, C, "running_mean");
  check_channels(running_var, C, "running_var");
  if (residual) check_like(*residual, x, "residual");
  TORCH_CHECK(!num_batches_tracked || (num_batches_tracked->scalar_type() == at::kLong &&
                                       num_batches_tracked->numel() == 1),
              "fused_bn_act: num_batches_tracked must be one int64");
  const Blocks blocks(x);
  const double n = static_cast<double>(blocks.all.count);

  std::vector<double> sums(2 * C);
  double* const mean = sums.data();
  double* const m2 = sums.data() + C;
  statistics(blocks, x, mean, m2);

  Tensor stats = at::empty({kStats, C}, weight.options());
  float* const out = stats.mutable_data_ptr<float>();
  const float* const w = weight.const_data_ptr<float>();
  const float* const b = bias.const_data_ptr<float>();
  float* const to_mean = running_mean.mutable_data_ptr<float>();
  float* const to_var = running_var.mutable_data_ptr<float>();
  for (int64_t c = 0; c < C; ++c) {
    const double invstd = 1.0 / std::sqrt(m2[c] / n + eps);
    const float scale = static_cast<float>(w[c] * invstd);
    out[kMean * C + c] = static_cast<float>(mean[c]);
    out[kInvStd * C + c] = static_cast<float>(invstd);
    out[kScale * C + c] = scale;
    // From the rounded scale, so that the mean cancels exactly.
    out[kShift * C + c] = static_cast<float>(b[c] - mean[c] * scale);
    to_mean[c] = static_cast<float>((1.0 - momentum) * to_mean[c] + momentum * mean[c]);
    to_var[c] = static_cast<float>((1.0 - momentum) * to_var[c] + momentum * m2[c] / (n - 1.0));
  }
  if (num_batches_tracked) *num_batches_tracked->mutable_data_ptr<int64_t>() += 1;

  const Tensor y = normalise(blocks, x, residual, out + kScale * C, out + kShift * C, relu);
  return {y, stats, Tensor(at::detail::empty_cpu({0}, at::kByte))};
}

// y by the running statistics, without a gradient.
Tensor eval(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& running_mean,
            const Tensor& running_var, const optional<Tensor>& residual, bool relu, double eps) {
  check_map(x, "x");
  const int64_t C = x.size(1);
  TORCH_CHECK(x.numel() > 0, "fused_bn_act: x is empty");
  check_channels(weight, C, "weight");
  check_channels(bias, C, "bias");
  check_channels(running_mean, C, "running_mean");
  check_channels(running_var, C, "running_var");
  if (residual) check_like(*residual, x, "residual");
  const float* const w = weight.const_data_ptr<float>();
  const float* const b = bias.const_data_ptr<float>();
  const float* const mean = running_mean.const_data_ptr<float>();
  const float* const var = running_var.const_data_ptr<float>();
  std::vector<float> scale(C), shift(C);
  for (int64_t c = 0; c < C; ++c) {
    scale[c] = static_cast<float>(w[c] / std::sqrt(var[c] + eps));
    // From the rounded scale, so that the mean cancels exactly.
    shift[c] = static_cast<float>(b[c] - static_cast<double>(mean[c]) * scale[c]);
  }
  return normalise(Blocks(x), x, residual, scale.data(), shift.data(), relu);
}

// The gradients of x, weight, bias and residual, empty where not wanted; the ReLU's mask is taken from
// `y` or, without it, from x.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_y_any, const Tensor& x,
                                                    const optional<Tensor>& y,
                                                    const Tensor& weight, const Tensor& stats,
                                                    bool relu, bool want_x, bool want_residual) {
  check_map(x, "x");
  const int64_t C = x.size(1);
  check_channels(weight, C, "weight");
  TORCH_CHECK(stats.scalar_type() == at::kFloat && stats.is_contiguous() && stats.dim() == 2 &&
                  stats.size(0) == kStats && stats.size(1) == C,
              "fused_bn_act: stats are not forward's");
  TORCH_CHECK(x.numel() > C, "fused_bn_act: more than one value a channel is needed");
  const Tensor grad_y = grad_y_any.contiguous(at::MemoryFormat::ChannelsLast);
  check_like(grad_y, x, "grad_y");
  if (y) check_like(*y, x, "y");
  const Blocks blocks(x);
  const int64_t width = blocks.all.width;
  const float* const kept = stats.const_data_ptr<float>();
  const Mask mask = !relu ? Mask::kNone : y ? Mask::kFromY : Mask::kFromX;

  std::vector<float> lanes(5 * width);
  const Affine affine = {
      repeated(lanes.data(), kept + kMean * C, blocks.all),
      repeated(lanes.data() + width, kept + kScale * C, blocks.all),
      repeated(lanes.data() + 2 * width, kept + kShift * C, blocks.all),
  };
  const void* const from = x.const_data_ptr();
  const void* const sign = y ? y->const_data_ptr() : nullptr;
  const void* grad = grad_y.const_data_ptr();

  Tensor grad_residual = want_residual ? at::empty_like(x) : at::empty({0}, x.options());
  void* const masked = want_residual ? grad_residual.mutable_data_ptr() : nullptr;
  std::vector<double> parts(2 * C * blocks.count);
  blocks.each(false, [&](int64_t block, Rows rows) {
    std::vector<float> scratch(2 * width);
    double* part = parts.data() + 2 * C * block;
    blocks.kernels->reduce(rows, mask, blocks.at(grad, block), blocks.at(from, block),
                           blocks.at(sign, block), blocks.at(masked, block), affine,
                           scratch.data(), part, part + C);
  });
  for (int64_t block = 1; block < blocks.count; ++block) {
    for (int64_t c = 0; c < 2 * C; ++c) parts[c] += parts[2 * C * block + c];
  }

  Tensor grad_weight = at::empty({C}, weight.options());
  Tensor grad_bias = at::empty({C}, weight.options());
  float* const to_weight = grad_weight.mutable_data_ptr<float>();
  float* const to_bias = grad_bias.mutable_data_ptr<float>();
  std::vector<float> slopes(C), offsets(C);
  const double n = static_cast<double>(blocks.all.count);
  for (int64_t c = 0; c < C; ++c) {
    const double invstd = kept[kInvStd * C + c];
    to_weight[c] = static_cast<float>(parts[C + c] * invstd);
    to_bias[c] = static_cast<float>(parts[c]);
    const double k = parts[C + c] * invstd * invstd / n;
    const double scale = kept[kScale * C + c];
    const float slope = static_cast<float>(-scale * k);
    slopes[c] = slope;
    // From the rounded slope, so that the mean cancels exactly.
    offsets[c] = static_cast<float>(-slope * static_cast<double>(kept[kMean * C + c]) -
                                    scale * parts[c] / n);
  }

  Tensor grad_x = want_x ? at::empty_like(x) : at::empty({0}, x.options());
  if (want_x) {
    const float* const slope = repeated(lanes.data() + 3 * width, slopes.data(), blocks.all);
    const float* const offset = repeated(lanes.data() + 4 * width, offsets.data(), blocks.all);
    void* const to = grad_x.mutable_data_ptr();
    // With a residual the first pass has written the masked gradient: read that.
    const Mask left = masked ? Mask::kNone : mask;
    if (masked) grad = masked;
    blocks.each(true, [&](int64_t block, Rows rows) {
      blocks.kernels->grad_input(rows, left, blocks.at(grad, block), blocks.at(from, block),
                                 blocks.at(sign, block), blocks.at(to, block), affine, slope,
                                 offset);
    });
  }
  return {grad_x, grad_weight, grad_bias, grad_residual};
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Differentiable : torch::autograd::Function<Differentiable> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                               const Tensor& bias, const optional<Tensor>& residual,
                               const Tensor& running_mean, const Tensor& running_var,
                               const optional<Tensor>& num_batches_tracked, bool relu,
                               double momentum, double eps) {
    static const auto op = find<decltype(fastokd::forward)>("fastokd::fused_bn_act");
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, stats, bits] = op.call(x, weight, bias, running_mean, running_var, num_batches_tracked,
                                    residual, relu, momentum, eps);
    running_mean.unsafeGetTensorImpl()->bump_version();
    running_var.unsafeGetTensorImpl()->bump_version();
    if (num_batches_tracked) num_batches_tracked->unsafeGetTensorImpl()->bump_version();
    ctx->save_for_backward({x, weight, stats, relu && residual ? y : Tensor()});
    ctx->saved_data["relu"] = relu;
    ctx->saved_data["residual"] = residual.has_value();
    ctx->set_materialize_grads(false);  // else a backward fills zeros for them
    ctx->mark_non_differentiable({stats, bits});
    return {y, stats, bits};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find<decltype(fastokd::backward)>("fastokd::fused_bn_act_backward");
    variable_list out(10);
    const Tensor& grad_y = grads[0];
    if (!grad_y.defined()) return out;
    const bool relu = ctx->saved_data["relu"].toBool();
    const bool want_residual = ctx->saved_data["residual"].toBool() && ctx->needs_input_grad(3);
    const bool want_x = ctx->needs_input_grad(0);
    if (!relu && want_residual) out[3] = grad_y;
    if (!want_x && !ctx->needs_input_grad(1) && !ctx->needs_input_grad(2) && out[3].defined()) {
      return out;
    }
    const variable_list saved = ctx->get_saved_variables();
    // Below autograd, whose fallback raises on a second derivative, unless one is recorded.
    optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (!at::GradMode::is_enabled()) below.emplace();
    const optional<Tensor> y = saved[3].defined() ? optional<Tensor>(saved[3]) : std::nullopt;
    auto [grad_x, grad_weight, grad_bias, grad_residual] =
        op.call(grad_y, saved[0], y, saved[1], saved[2], relu, want_x, relu && want_residual);
    if (want_x) out[0] = grad_x;
    if (ctx->needs_input_grad(1)) out[1] = grad_weight;
    if (ctx->needs_input_grad(2)) out[2] = grad_bias;
    if (relu && want_residual) out[3] = grad_residual;
    return out;
  }
};

std::tuple<Tensor, Tensor, Tensor> forward_autograd(const Tensor& x, const Tensor& weight,
                                                    const Tensor& bias, Tensor running_mean,
                                                    Tensor running_var,
                                                    optional<Tensor> num_batches_tracked,
                                                    const optional<Tensor>& residual, bool relu,
                                                    double momentum, double eps) {
  const variable_list out =
      Differentiable::apply(x, weight, bias, residual, running_mean, running_var,
                            num_batches_tracked, relu, momentum, eps);
  return {out[0], out[1], out[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastokd, AutogradCPU, m) {
  m.impl("fused_bn_act", forward_autograd);
  m.impl("fused_bn_act_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("fused_bn_act_eval", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(fastokd, CPU, m) {
  m.impl("fused_bn_act", forward);
  m.impl("fused_bn_act_backward", backward);
  m.impl("fused_bn_act_eval", eval);
}

}  // namespace fastokd
