// The dispatcher's side of a weight's gradient: threads take its blocks, and parts of the batch where
// there are too few blocks, down to bands of an image's rows; partial sums are added in a fixed order.
#include "conv_weight_grad_kernel.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>

#include "op.h"

namespace fastokd {
namespace {

void check_map(const Tensor& x) {
  TORCH_CHECK(is_channels_last(x) && x.scalar_type() == at::kBFloat16 && x.size(1) % 16 == 0,
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

// Into how many parts the batch is split to balance the threads: one where the weight's blocks suffice,
// since every part needs sums of the whole weight.
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
  // Bounds first, so that the arithmetic below can't overflow.
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
  const int64_t images = parts_of(outputs.count * inputs.count, pairs, threads);
  const int64_t bands = pieces(outputs.count * inputs.count * images, s.OH);
  const int64_t parts = images * bands;
  const int64_t size = s.O * kernel * kernel * s.C;
  // [O, K, K, C] in memory is a weight [O, C, K, K] in channels-last. The first part's sums go there.
  Tensor grad_w = new_channels_last({s.O, s.C, kernel, kernel}, at::kFloat);
  // Without elements the sizes may be anything.
  if (x.numel() == 0 || grad_y.numel() == 0) return grad_w.zero_();
  const Tensor others = at::detail::empty_cpu({parts - 1, size}, at::kFloat);
  const int64_t each = (conv_weight_grad_scratch(s, B) + 15) / 16 * 16;
  const Tensor scratch = at::detail::empty_cpu({threads, each}, at::kInt);
  float* const w = grad_w.mutable_data_ptr<float>();
  float* const rest = others.mutable_data_ptr<float>();
  parallel(outputs.count * inputs.count * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t part = item % parts, block = item / parts;
      const int64_t image = part / bands, band = part % bands;
      const int64_t first = pairs * image / images * 2;
      const int64_t last = std::min(B, pairs * (image + 1) / images * 2);
      const int64_t o = block / inputs.count, c = block % inputs.count;
      conv_weight_grad_avx512(
          s, {outputs.begin(o), outputs.length(o), inputs.begin(c), inputs.length(c)},
          static_cast<const uint16_t*>(x.const_data_ptr()) + first * s.H * s.W * s.C,
          static_cast<const uint16_t*>(grad_y.const_data_ptr()) + first * s.OH * s.OW * s.O,
          last - first, s.OH * band / bands, s.OH * (band + 1) / bands,
          static_cast<uint32_t*>(scratch.mutable_data_ptr()) + at::get_thread_num() * each,
          part == 0 ? w : rest + (part - 1) * size);
    }
  });
  parallel(size, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t part = 1; part < parts; ++part) {
      for (int64_t n = begin; n < end; ++n) w[n] += rest[(part - 1) * size + n];
    }
  });
  return grad_w;
#else
  TORCH_CHECK(false, "this CPU has no AVX-512 BF16");
#endif
}

}  // namespace

TORCH_LIBRARY_IMPL(fastokd, CPU, m) { m.impl("conv_weight_grad", conv_weight_grad); }

TORCH_LIBRARY_IMPL(fastokd, AutogradCPU, m) {
  m.impl("conv_weight_grad", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace fastokd
