// The dispatcher's side of 3x3 max pooling: threads take rows. It saves a byte a value for the gradient;
// torch saves its input and eight bytes a value.
#include "max_pool_kernel.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>

#include "op.h"

namespace fastokd {
namespace {

Type type_of_map(const Tensor& x, const char* name) {
  TORCH_CHECK(is_channels_last(x) && x.size(1) % 16 == 0, "max_pool: ", name,
              " must be channels-last, of a multiple of 16 channels");
  return type_of(x, name);
}

int64_t pooled(int64_t size, int64_t stride) { return (size - 1) / stride + 1; }

PoolShape shape_of(int64_t H, int64_t W, int64_t C, int64_t stride) {
  TORCH_CHECK(stride == 1 || stride == 2, "max_pool: the stride must be 1 or 2, not ", stride);
  TORCH_CHECK(H > 0 && W > 0, "max_pool: a map must have pixels, not ", H, " x ", W);
  return {H, W, C, pooled(H, stride), pooled(W, stride), stride};
}

std::tuple<Tensor, Tensor> max_pool(const Tensor& x, int64_t stride) {
  const Type type = type_of_map(x, "x");
  const PoolShape s = shape_of(x.size(2), x.size(3), x.size(1), stride);
  const int64_t sizes[] = {x.size(0), s.C, s.OH, s.OW};
  Tensor y = new_channels_last(sizes, x.scalar_type());
  Tensor taps = new_channels_last(sizes, at::kByte);
  const void* const from = x.const_data_ptr();
  void* const to = y.mutable_data_ptr();
  uint8_t* const bytes = taps.mutable_data_ptr<uint8_t>();
  parallel(x.size(0) * s.OH, 1, [&](int64_t begin, int64_t end) {
    FASTOKD_DISPATCH(max_pool)(type, s, from, to, bytes, begin, end);
  });
  return {y, taps};
}

Tensor max_pool_backward(const Tensor& grad_y, const Tensor& taps, int64_t stride, int64_t height,
                         int64_t width) {
  const Type type = type_of_map(grad_y, "grad_y");
  const PoolShape s = shape_of(height, width, grad_y.size(1), stride);
  TORCH_CHECK(taps.scalar_type() == at::kByte && taps.sizes() == grad_y.sizes() &&
                  is_channels_last(taps) && grad_y.size(2) == s.OH && grad_y.size(3) == s.OW,
              "max_pool: taps and grad_y must be of forward's shape");
  const int64_t B = grad_y.size(0);
  Tensor grad_x = new_channels_last({B, s.C, s.H, s.W}, grad_y.scalar_type());
  const void* const from = grad_y.const_data_ptr();
  const uint8_t* const bytes = taps.const_data_ptr<uint8_t>();
  void* const to = grad_x.mutable_data_ptr();
  parallel(B * s.H, 1, [&](int64_t begin, int64_t end) {
    FASTOKD_DISPATCH(max_pool_gradient)(type, s, from, bytes, to, begin, end);
  });
  return grad_x;
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Pool : torch::autograd::Function<Pool> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, int64_t stride) {
    static const auto op = find<decltype(fastokd::max_pool)>("fastokd::max_pool");
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, taps] = op.call(x, stride);
    ctx->save_for_backward({taps});
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["height"] = x.size(2);
    ctx->saved_data["width"] = x.size(3);
    ctx->set_materialize_grads(false);  // else a backward fills zeros for the taps
    ctx->mark_non_differentiable({taps});
    return {y, taps};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto op = find<decltype(max_pool_backward)>("fastokd::max_pool_backward");
    if (!grads[0].defined()) return {Tensor(), Tensor()};
    const Tensor grad_y = grads[0].contiguous(at::MemoryFormat::ChannelsLast);
    // Below autograd, whose fallback raises on a second derivative, unless one is recorded.
    optional<at::AutoDispatchBelowADInplaceOrView> below;
    if (!at::GradMode::is_enabled()) below.emplace();
    return {op.call(grad_y, ctx->get_saved_variables()[0], ctx->saved_data["stride"].toInt(),
                    ctx->saved_data["height"].toInt(), ctx->saved_data["width"].toInt()),
            Tensor()};
  }
};

std::tuple<Tensor, Tensor> max_pool_autograd(const Tensor& x, int64_t stride) {
  const variable_list out = Pool::apply(x, stride);
  return {out[0], out[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastokd, CPU, m) {
  m.impl("max_pool", max_pool);
  m.impl("max_pool_backward", max_pool_backward);
}

TORCH_LIBRARY_IMPL(fastokd, AutogradCPU, m) {
  m.impl("max_pool", max_pool_autograd);
  m.impl("max_pool_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fastokd
