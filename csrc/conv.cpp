// The dispatcher's side of a convolution in bfloat16, and its gradients: threads take rows of all images.
// What the kernels don't take is computed by torch.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/conv_transpose2d.h>
#include <ATen/ops/convolution_backward.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>

#include "narrow_conv_kernel.h"
#include "op.h"

namespace fastokd {

// Half of a small L2 cache: the weight is read again for every few pixels.
constexpr int64_t kL2Bytes = 512 * 1024;

bool narrow_conv_takes(const NarrowShape& s) {
  const bool fits = s.places == Places::kTwice
                        ? s.OH == 2 * s.H && s.OW == 2 * s.W
                        : s.places == Places::kHalf ? s.H == 2 * s.OH && s.W == 2 * s.OW : true;
  return fits && s.H > 0 && s.W > 0 && s.inputs % 16 == 0 && s.outputs % 16 == 0 &&
         s.OW % 8 == 0 && (s.places == Places::kSame ? s.inputs <= 64 : narrow_conv_packed(s) * 4 <= kL2Bytes);
}

int64_t narrow_conv_packed(const NarrowShape& s) { return 9 * s.outputs * s.inputs / 2; }

int64_t narrow_conv_scratch(const NarrowShape& s) { return 4 * (s.W + 2) * s.inputs / 2; }

namespace {

// False for fake tensors, and under a dispatch mode (a trace, a FLOP count), which must see torch's
// operators.
bool has_values(const Tensor& x) {
  const c10::DispatchKeySet others({c10::DispatchKey::Python, c10::DispatchKey::Negative});
  return !x.key_set().has_any(others) && !c10::impl::dispatch_mode_enabled();
}

// The convolution of x, or its input's gradient from y's: by our kernel where that takes it.
optional<Tensor> by_kernel(const Tensor& x, const Tensor& weight, int64_t stride,
                                int64_t padding, bool gradient, at::IntArrayRef sizes) {
#if FASTOKD_X86
  const Places places = stride == 1 ? Places::kSame : gradient ? Places::kTwice : Places::kHalf;
  const NarrowShape s = {places, x.size(2), x.size(3), x.size(1), sizes[2], sizes[3], sizes[1]};
  if (!has_values(x) || !has_values(weight) || weight.size(2) != 3 || weight.size(3) != 3 || padding != 1 || stride > 2 ||
      capability() != Capability::kAvx512Bf16 || x.scalar_type() != at::kBFloat16 ||
      weight.scalar_type() != at::kBFloat16 ||
      !is_channels_last(x) || !narrow_conv_takes(s)) {
    return std::nullopt;
  }
  const int64_t B = x.size(0), threads = at::get_num_threads();
  const Tensor dense = weight.contiguous(at::MemoryFormat::ChannelsLast);
  const int64_t words = narrow_conv_packed(s), each = narrow_conv_scratch(s);
  const Tensor memory = at::detail::empty_cpu({words + threads * each}, at::kInt);
  uint32_t* const packed = static_cast<uint32_t*>(memory.mutable_data_ptr());
  narrow_conv_pack_avx512(s, gradient, static_cast<const uint16_t*>(dense.const_data_ptr()),
                          packed);
  Tensor y = new_channels_last(sizes, at::kBFloat16);
  const uint16_t* const from = static_cast<const uint16_t*>(x.const_data_ptr());
  uint16_t* const to = static_cast<uint16_t*>(y.mutable_data_ptr());
  parallel(B * s.OH, 1, [&](int64_t begin, int64_t end) {
    narrow_conv_avx512(s, from, packed, begin, end, packed + words + at::get_thread_num() * each,
                       to);
  });
  return y;
#else
  return std::nullopt;
#endif
}

Tensor conv2d(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding) {
  TORCH_CHECK(x.dim() == 4 && x.is_floating_point() && weight.is_floating_point(),
              "conv2d takes floating point maps [B, C, H, W] and weights");
  TORCH_CHECK(x.is_cpu() && weight.is_cpu(), "conv2d takes tensors of the CPU");
  TORCH_CHECK(weight.dim() == 4 && weight.size(1) == x.size(1) &&
                  weight.size(2) == weight.size(3) && stride >= 1,
              "conv2d takes weights [O, C, K, K] and a stride of 1 at least");
  const Tensor narrow = weight.to(x.scalar_type());
  const int64_t OH = (x.size(2) - 1) / stride + 1, OW = (x.size(3) - 1) / stride + 1;
  const auto y =
      by_kernel(x, narrow, stride, padding, false, {x.size(0), narrow.size(0), OH, OW});
  return y ? *y : at::conv2d(x, narrow, {}, {stride, stride}, {padding, padding});
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Whether conv_weight_grad takes the maps and the kernel.
bool sums_of(const Tensor& grad_y, const Tensor& x, const Tensor& weight) {
  const auto suits = [](const Tensor& map) {
    return map.scalar_type() == at::kBFloat16 && map.size(1) % 16 == 0 &&
           is_channels_last(map);
  };
  return suits(grad_y) && suits(x) && has_values(grad_y) && has_values(x) &&
         (weight.size(2) == 1 || weight.size(2) == 3) && capability() == Capability::kAvx512Bf16;
}

// The gradients of a convolution, or of a transposed one: those that the kernels don't compute are
// torch's. The weight's gradient has the weight's dtype, which under autocast is wider than x's.
struct Gradients {
  AutogradContext* ctx;
  Tensor x, weight, grad_y;
  int64_t stride, padding;

  Gradients(AutogradContext* ctx, const variable_list& grads)
      : ctx(ctx),
        grad_y(grads[0].contiguous(at::MemoryFormat::ChannelsLast)),
        stride(ctx->saved_data["stride"].toInt()),
        padding(ctx->saved_data["padding"].toInt()) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "this convolution is differentiable once: impl='torch' is for more");
    const auto saved = ctx->get_saved_variables();
    x = saved[0];
    weight = saved[1];
  }

  variable_list finish(Tensor grad_x, Tensor grad_w, bool transposed) const {
    const bool x_left = ctx->needs_input_grad(0) && !grad_x.defined();
    const bool w_left = ctx->needs_input_grad(1) && !grad_w.defined();
    if (x_left || w_left) {
      const int64_t more = transposed ? 1 : 0;
      auto found = at::convolution_backward(grad_y, x, weight, c10::nullopt, {stride, stride},
                                            {padding, padding}, {1, 1}, transposed, {more, more}, 1,
                                            {x_left, w_left, false});
      if (x_left) grad_x = std::get<0>(found);
      if (w_left) grad_w = std::get<1>(found);
    }
    if (grad_w.defined()) grad_w = grad_w.to(ctx->saved_data["dtype"].toScalarType());
    return {grad_x, grad_w, Tensor(), Tensor()};
  }

  Tensor weights(const Tensor& written, const Tensor& read) const {
    static const auto op = find<Tensor(const Tensor&, const Tensor&, int64_t, int64_t, int64_t)>(
        "fastokd::conv_weight_grad");
    if (!ctx->needs_input_grad(1) || !sums_of(written, read, weight)) return {};
    return op.call(written, read, weight.size(2), stride, padding);
  }
};

void keep(AutogradContext* ctx, const Tensor& x, const Tensor& narrow, const Tensor& weight,
          int64_t stride, int64_t padding) {
  ctx->save_for_backward({x, narrow});
  ctx->saved_data["stride"] = stride;
  ctx->saved_data["padding"] = padding;
  ctx->saved_data["dtype"] = weight.scalar_type();
}

struct Conv2d : torch::autograd::Function<Conv2d> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, int64_t stride,
                        int64_t padding) {
    static const auto op = find<decltype(fastokd::conv2d)>("fastokd::conv2d");
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor narrow = weight.to(x.scalar_type());
    keep(ctx, x, narrow, weight, stride, padding);
    return op.call(x, narrow, stride, padding);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Gradients all(ctx, grads);
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor grad_x;
    if (ctx->needs_input_grad(0)) {
      grad_x = by_kernel(all.grad_y, all.weight, all.stride, all.padding, true, all.x.sizes())
                   .value_or(Tensor());
    }
    return all.finish(grad_x, all.weights(all.grad_y, all.x), false);
  }
};

Tensor conv2d_autograd(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding) {
  return Conv2d::apply(x, weight, stride, padding);
}

// A decoder's layer: the input gradient of a 3x3 convolution of stride 2 and padding 1, to maps of twice
// the height and width.
Tensor conv_transpose2d(const Tensor& x, const Tensor& weight) {
  TORCH_CHECK(x.dim() == 4 && x.is_floating_point() && weight.is_floating_point(),
              "conv_transpose2d takes floating point maps [B, C, H, W] and weights");
  TORCH_CHECK(x.is_cpu() && weight.is_cpu(), "conv_transpose2d takes tensors of the CPU");
  TORCH_CHECK(weight.dim() == 4 && weight.size(0) == x.size(1) && weight.size(2) == 3 &&
                  weight.size(3) == 3,
              "conv_transpose2d takes weights [C, O, 3, 3]");
  const Tensor narrow = weight.to(x.scalar_type());
  const auto y = by_kernel(x, narrow, 2, 1, true,
                           {x.size(0), narrow.size(1), 2 * x.size(2), 2 * x.size(3)});
  return y ? *y : at::conv_transpose2d(x, narrow, {}, {2, 2}, {1, 1}, {1, 1});
}

struct ConvTranspose2d : torch::autograd::Function<ConvTranspose2d> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight) {
    static const auto op = find<decltype(fastokd::conv_transpose2d)>("fastokd::conv_transpose2d");
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor narrow = weight.to(x.scalar_type());
    keep(ctx, x, narrow, weight, 2, 1);
    return op.call(x, narrow);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Gradients all(ctx, grads);
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor grad_x;
    if (ctx->needs_input_grad(0)) {
      grad_x = by_kernel(all.grad_y, all.weight, 2, 1, false, all.x.sizes()).value_or(Tensor());
    }
    // x and y swap roles.
    variable_list found = all.finish(grad_x, all.weights(all.x, all.grad_y), true);
    found.resize(2);
    return found;
  }
};

Tensor conv_transpose2d_autograd(const Tensor& x, const Tensor& weight) {
  return ConvTranspose2d::apply(x, weight);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastokd, CPU, m) {
  m.impl("conv2d", conv2d);
  m.impl("conv_transpose2d", conv_transpose2d);
}

TORCH_LIBRARY_IMPL(fastokd, AutogradCPU, m) {
  m.impl("conv2d", conv2d_autograd);
  m.impl("conv_transpose2d", conv_transpose2d_autograd);
}

}  // namespace fastokd
