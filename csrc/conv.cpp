// The dispatcher's side of a convolution in bfloat16: work is shared out among threads, and sums are
// added in its order. What the kernels don't take is torch's.
#include "conv_weight_grad_kernel.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/conv_transpose2d.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "capability.h"
#include "narrow_conv_kernel.h"

namespace fastokd {

// Half of a small L2 cache: the weight is read anew for every few places.
constexpr int64_t kL2Bytes = 512 * 1024;

bool narrow_conv_takes(const NarrowShape& s) {
  const bool fits = s.places == Places::kTwice
                        ? s.OH == 2 * s.H && s.OW == 2 * s.W
                        : s.places == Places::kHalf ? s.H == 2 * s.OH && s.W == 2 * s.OW : true;
  return fits && s.inputs % 16 == 0 && s.outputs % 16 == 0 && s.OW % 8 == 0 &&
         (s.places == Places::kSame ? s.inputs <= 64 : narrow_conv_packed(s) * 4 <= kL2Bytes);
}

int64_t narrow_conv_packed(const NarrowShape& s) { return 9 * s.outputs * s.inputs / 2; }

int64_t narrow_conv_scratch(const NarrowShape& s) { return 4 * (s.W + 2) * s.inputs / 2; }

namespace {

using at::Tensor;

void check_map(const Tensor& x) {
  TORCH_CHECK(x.dim() == 4 && x.scalar_type() == at::kBFloat16 && x.size(1) % 16 == 0 &&
                  x.is_contiguous(at::MemoryFormat::ChannelsLast),
              "the maps must be bfloat16, channels-last, of a multiple of 16 channels");
}

ConvShape shape_of(const Tensor& x, const Tensor& grad_y, int64_t kernel, int64_t stride,
                   int64_t padding) {
  return {x.size(2),      x.size(3), x.size(1), grad_y.size(2), grad_y.size(3),
          grad_y.size(1), kernel,    stride,    padding};
}

// Channels as blocks of about the same length.
struct Split {
  int64_t groups, count;
  explicit Split(int64_t channels)
      : groups(channels / 16), count((channels + kConvBlock - 1) / kConvBlock) {}
  int64_t begin(int64_t n) const { return groups * n / count * 16; }
  int64_t length(int64_t n) const { return begin(n + 1) - begin(n); }
};

// How often the images are parted, so that the threads get about as much work each: by blocks of the
// weight alone where those suffice, since every part has sums of the whole weight.
int64_t parts_of(int64_t blocks, int64_t pairs, int64_t threads) {
  int64_t parts = 1;
  while (parts < pairs && blocks * parts % threads != 0 && blocks * parts < 8 * threads) ++parts;
  return parts;
}

Tensor conv_weight_grad(const Tensor& grad_y, const Tensor& x, int64_t kernel, int64_t stride,
                        int64_t padding) {
  check_map(grad_y);
  check_map(x);
  const ConvShape s = shape_of(x, grad_y, kernel, stride, padding);
  // Bounds first: what follows adds and multiplies them.
  TORCH_CHECK(stride < (1 << 16) && padding < (1 << 16), "stride and padding must be below 65536, not ",
              stride, " and ", padding);
  TORCH_CHECK((kernel == 1 || kernel == 3) && stride >= 1 && padding >= 0 && x.size(0) == grad_y.size(0) &&
                  s.OH == (s.H + 2 * padding - kernel) / stride + 1 &&
                  s.OW == (s.W + 2 * padding - kernel) / stride + 1,
              "grad_y must be of the convolution's shape, and the kernel of side 1 or 3");
#if FASTOKD_X86
  TORCH_CHECK(capability() == Capability::kAvx512Bf16, "this CPU has no AVX-512 BF16");
  const int64_t B = x.size(0), threads = at::get_num_threads(), pairs = (B + 1) / 2;
  const Split outputs(s.O), inputs(s.C);
  const int64_t parts = parts_of(outputs.count * inputs.count, pairs, threads);
  const int64_t size = s.O * kernel * kernel * s.C;
  Tensor sums = at::detail::empty_cpu({parts, size}, at::kFloat);
  const int64_t each = (conv_weight_grad_scratch(s, B) + 15) / 16 * 16;
  const Tensor scratch = at::detail::empty_cpu({threads, each}, at::kInt);
  float* const w = sums.mutable_data_ptr<float>();
  at::parallel_for(0, outputs.count * inputs.count * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t part = item % parts, block = item / parts;
      const int64_t first = pairs * part / parts * 2;
      const int64_t last = std::min(B, pairs * (part + 1) / parts * 2);
      const int64_t o = block / inputs.count, c = block % inputs.count;
      conv_weight_grad_avx512(
          s, {outputs.begin(o), outputs.length(o), inputs.begin(c), inputs.length(c)},
          static_cast<const uint16_t*>(x.const_data_ptr()) + first * s.H * s.W * s.C,
          static_cast<const uint16_t*>(grad_y.const_data_ptr()) + first * s.OH * s.OW * s.O,
          last - first,
          static_cast<uint32_t*>(scratch.mutable_data_ptr()) + at::get_thread_num() * each,
          w + part * size);
    }
  });
  at::parallel_for(0, size, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t n = begin; n < end; ++n) w[n] += w[part * size + n];
    }
  });
  // [O, K, K, C] in memory is a weight [O, C, K, K] in channels-last.
  return sums[0].view({s.O, kernel, kernel, s.C}).permute({0, 3, 1, 2});
#else
  TORCH_CHECK(false, "this CPU has no AVX-512 BF16");
#endif
}

// The convolution of x, or its input's gradient from y's: by our kernel where that takes it.
std::optional<Tensor> by_kernel(const Tensor& x, const Tensor& weight, int64_t stride,
                                int64_t padding, bool gradient, at::IntArrayRef sizes) {
#if FASTOKD_X86
  const Places places = stride == 1 ? Places::kSame : gradient ? Places::kTwice : Places::kHalf;
  const NarrowShape s = {places, x.size(2), x.size(3), x.size(1), sizes[2], sizes[3], sizes[1]};
  // A fake tensor has no values; torch's own operator knows what to do with it.
  if (x.key_set().has(c10::DispatchKey::Python) || weight.size(2) != 3 || weight.size(3) != 3 || padding != 1 || stride > 2 ||
      capability() != Capability::kAvx512Bf16 || x.scalar_type() != at::kBFloat16 ||
      weight.scalar_type() != at::kBFloat16 ||
      !x.is_contiguous(at::MemoryFormat::ChannelsLast) || !narrow_conv_takes(s)) {
    return std::nullopt;
  }
  const int64_t B = x.size(0), threads = at::get_num_threads();
  const Tensor dense = weight.contiguous(at::MemoryFormat::ChannelsLast);
  const int64_t words = narrow_conv_packed(s), each = narrow_conv_scratch(s);
  const Tensor memory = at::detail::empty_cpu({words + threads * each}, at::kInt);
  uint32_t* const packed = static_cast<uint32_t*>(memory.mutable_data_ptr());
  narrow_conv_pack_avx512(s, gradient, static_cast<const uint16_t*>(dense.const_data_ptr()),
                          packed);
  Tensor y = at::detail::empty_cpu(sizes, at::kBFloat16, false, at::MemoryFormat::ChannelsLast);
  const uint16_t* const from = static_cast<const uint16_t*>(x.const_data_ptr());
  uint16_t* const to = static_cast<uint16_t*>(y.mutable_data_ptr());
  at::parallel_for(0, B, (B + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    narrow_conv_avx512(s, from + begin * s.H * s.W * s.inputs, packed, end - begin,
                       packed + words + at::get_thread_num() * each,
                       to + begin * s.OH * s.OW * s.outputs);
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
  const Tensor narrow = weight.to(x.scalar_type());
  if (x.dim() == 4 && narrow.dim() == 4 && narrow.size(1) == x.size(1) && stride >= 1) {
    const int64_t OH = (x.size(2) - 1) / stride + 1, OW = (x.size(3) - 1) / stride + 1;
    const auto y = by_kernel(x, narrow, stride, padding, false,
                             {x.size(0), narrow.size(0), OH, OW});
    if (y) return *y;
  }
  return at::conv2d(x, narrow, {}, {stride, stride}, {padding, padding});
}

// By the dispatcher, which knows fake tensors; wide where the weight was, as under autocast.
Tensor weight_grad(const Tensor& grad_y, const Tensor& x, int64_t kernel, int64_t stride,
                   int64_t padding, at::ScalarType dtype) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastokd::conv_weight_grad", "")
                             .typed<decltype(conv_weight_grad)>();
  return op.call(grad_y, x, kernel, stride, padding).to(dtype);
}

struct Conv2d : torch::autograd::Function<Conv2d> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x,
                        const Tensor& weight, int64_t stride, int64_t padding) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor narrow = weight.to(x.scalar_type());
    ctx->save_for_backward({x, narrow});
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dtype"] = weight.scalar_type();
    return conv2d(x, narrow, stride, padding);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    const int64_t stride = ctx->saved_data["stride"].toInt();
    const int64_t padding = ctx->saved_data["padding"].toInt();
    TORCH_CHECK(!grads[0].requires_grad(), "conv2d is differentiable once");
    const Tensor grad_y = grads[0].contiguous(at::MemoryFormat::ChannelsLast);
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor grad_x, grad_w;
    if (ctx->needs_input_grad(0)) {
      grad_x = by_kernel(grad_y, weight, stride, padding, true, x.sizes()).value_or(Tensor());
    }
    if (ctx->needs_input_grad(1)) {
      grad_w = weight_grad(grad_y, x, weight.size(2), stride, padding,
                           ctx->saved_data["dtype"].toScalarType());
    }
    if (ctx->needs_input_grad(0) && !grad_x.defined()) {
      grad_x = std::get<0>(at::convolution_backward(grad_y, x, weight, c10::nullopt, {stride, stride},
                                                    {padding, padding}, {1, 1}, false, {0, 0}, 1,
                                                    {true, false, false}));
    }
    return {grad_x, grad_w, Tensor(), Tensor()};
  }
};

Tensor conv2d_autograd(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding) {
  return Conv2d::apply(x, weight, stride, padding);
}

// A decoder's step: the gradient of the input of a 3x3 convolution of stride 2, padding 1, to maps of
// twice the height and width.
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
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x,
                        const Tensor& weight) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Tensor narrow = weight.to(x.scalar_type());
    ctx->save_for_backward({x, narrow});
    ctx->saved_data["dtype"] = weight.scalar_type();
    return fastokd::conv_transpose2d(x, narrow);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    TORCH_CHECK(!grads[0].requires_grad(), "conv_transpose2d is differentiable once");
    const Tensor grad_y = grads[0].contiguous(at::MemoryFormat::ChannelsLast);
    at::AutoDispatchBelowADInplaceOrView guard;
    Tensor grad_x, grad_w;
    if (ctx->needs_input_grad(0)) grad_x = fastokd::conv2d(grad_y, weight, 2, 1);
    if (ctx->needs_input_grad(1)) {
      // x and y change places.
      grad_w = weight_grad(x, grad_y, 3, 2, 1, ctx->saved_data["dtype"].toScalarType());
    }
    return {grad_x, grad_w};
  }
};

Tensor conv_transpose2d_autograd(const Tensor& x, const Tensor& weight) {
  return ConvTranspose2d::apply(x, weight);
}

}  // namespace

TORCH_LIBRARY_IMPL(fastokd, CPU, m) {
  m.impl("conv2d", conv2d);
  m.impl("conv_transpose2d", conv_transpose2d);
  m.impl("conv_weight_grad", conv_weight_grad);
}

TORCH_LIBRARY_IMPL(fastokd, AutogradCPU, m) {
  m.impl("conv2d", conv2d_autograd);
  m.impl("conv_transpose2d", conv_transpose2d_autograd);
  m.impl("conv_weight_grad", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fastokd
