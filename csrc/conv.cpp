// The dispatcher's side of a convolution in bfloat16: work is shared out among threads, and sums are
// added in its order. What the kernels don't take is torch's.
#include "conv_weight_grad_kernel.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/conv_transpose2d.h>
#include <ATen/ops/convolution_backward.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
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
  return fits && s.H > 0 && s.inputs % 16 == 0 && s.outputs % 16 == 0 && s.OW % 8 == 0 &&
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
  TORCH_CHECK((kernel == 1 || kernel == 3) && stride >= 1 && padding >= 0 &&
                  x.size(0) == grad_y.size(0) && s.H + 2 * padding >= kernel &&
                  s.W + 2 * padding >= kernel &&
                  s.OH == (s.H + 2 * padding - kernel) / stride + 1 &&
                  s.OW == (s.W + 2 * padding - kernel) / stride + 1,
              "grad_y must be of the convolution's shape, and the kernel of side 1 or 3");
#if FASTOKD_X86
  TORCH_CHECK(capability() == Capability::kAvx512Bf16, "this CPU has no AVX-512 BF16");
  const int64_t B = x.size(0), threads = at::get_num_threads(), pairs = (B + 1) / 2;
  const Split outputs(s.O), inputs(s.C);
  const int64_t parts = parts_of(outputs.count * inputs.count, pairs, threads);
  const int64_t size = s.O * kernel * kernel * s.C;
  // [O, K, K, C] in memory is a weight [O, C, K, K] in channels-last. It holds the first part's sums.
  Tensor grad_w = at::detail::empty_cpu({s.O, s.C, kernel, kernel}, at::kFloat, false,
                                        at::MemoryFormat::ChannelsLast);
  // Of no sums the sizes may be anything.
  if (x.numel() == 0 || grad_y.numel() == 0) return grad_w.zero_();
  const Tensor others = at::detail::empty_cpu({parts - 1, size}, at::kFloat);
  const int64_t each = (conv_weight_grad_scratch(s, B) + 15) / 16 * 16;
  const Tensor scratch = at::detail::empty_cpu({threads, each}, at::kInt);
  float* const w = grad_w.mutable_data_ptr<float>();
  float* const rest = others.mutable_data_ptr<float>();
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
          part == 0 ? w : rest + (part - 1) * size);
    }
  });
  at::parallel_for(0, size, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t n = begin; n < end; ++n) w[n] += rest[(part - 1) * size + n];
    }
  });
  return grad_w;
#else
  TORCH_CHECK(false, "this CPU has no AVX-512 BF16");
#endif
}

// A fake tensor has none, and what looks on (a trace, a count of FLOPs) must see torch's operators.
bool has_values(const Tensor& x) {
  return !x.key_set().has_any(c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::Negative})) &&
         !c10::impl::dispatch_mode_enabled();
}

// The convolution of x, or its input's gradient from y's: by our kernel where that takes it.
std::optional<Tensor> by_kernel(const Tensor& x, const Tensor& weight, int64_t stride,
                                int64_t padding, bool gradient, at::IntArrayRef sizes) {
#if FASTOKD_X86
  const Places places = stride == 1 ? Places::kSame : gradient ? Places::kTwice : Places::kHalf;
  const NarrowShape s = {places, x.size(2), x.size(3), x.size(1), sizes[2], sizes[3], sizes[1]};
  if (!has_values(x) || !has_values(weight) || weight.size(2) != 3 || weight.size(3) != 3 || padding != 1 || stride > 2 ||
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

template <class Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Whether conv_weight_grad takes the maps and the kernel.
bool sums_of(const Tensor& grad_y, const Tensor& x, const Tensor& weight) {
  const auto suits = [](const Tensor& map) {
    return map.scalar_type() == at::kBFloat16 && map.size(1) % 16 == 0 &&
           map.is_contiguous(at::MemoryFormat::ChannelsLast);
  };
  return suits(grad_y) && suits(x) && (weight.size(2) == 1 || weight.size(2) == 3) &&
         capability() == Capability::kAvx512Bf16;
}

// The gradients of a convolution, or of a transposed one, of which `ours` are those that the kernels
// gave, if any: torch's where there are none. A weight that was wider than x, as under autocast, has a
// gradient as wide.
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
    static const auto op = find<decltype(conv_weight_grad)>("fastokd::conv_weight_grad");
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
    // x and y change places.
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
  m.impl("conv_weight_grad", conv_weight_grad);
}

TORCH_LIBRARY_IMPL(fastokd, AutogradCPU, m) {
  m.impl("conv2d", conv2d_autograd);
  m.impl("conv_transpose2d", conv_transpose2d_autograd);
  m.impl("conv_weight_grad", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fastokd
