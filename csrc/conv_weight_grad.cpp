// The dispatcher's side of a convolution's weight gradient: images are shared out among threads,
// whose sums are added in their order.
#include "conv_weight_grad_kernel.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "capability.h"

namespace fastokd {

// Half of a small L1 cache: the sums pass through it too.
constexpr int64_t kStripBytes = 36 * 1024;

int64_t conv_scratch(const ConvShape& s, int64_t strip) {
  const int64_t rows = (strip - 1) * s.stride + s.K;
  return rows * (s.W + 2 * s.padding) * s.C + strip * ((s.OW + 1) / 2) * s.O;
}

int64_t conv_strip(const ConvShape& s) {
  int64_t strip = 1;
  while (strip < s.OH && conv_scratch(s, strip + 1) * 4 <= kStripBytes) ++strip;
  return strip;
}

namespace {

using at::Tensor;

void check_map(const Tensor& x) {
  TORCH_CHECK(x.dim() == 4 && x.scalar_type() == at::kBFloat16 && x.size(1) % 16 == 0 &&
                  x.is_contiguous(at::MemoryFormat::ChannelsLast),
              "the maps must be bfloat16, channels-last, of a multiple of 16 channels");
}

Tensor conv_weight_grad(const Tensor& grad_y, const Tensor& x, int64_t kernel, int64_t stride,
                        int64_t padding) {
  check_map(grad_y);
  check_map(x);
  const ConvShape s = {x.size(2),      x.size(3),      x.size(1), grad_y.size(2), grad_y.size(3),
                       grad_y.size(1), kernel,         stride,    padding};
  TORCH_CHECK((kernel == 1 || kernel == 3) && stride >= 1 && padding >= 0 && x.size(0) == grad_y.size(0) &&
                  s.OH == (s.H + 2 * padding - kernel) / stride + 1 &&
                  s.OW == (s.W + 2 * padding - kernel) / stride + 1,
              "grad_y must be of the convolution's shape, and the kernel of side 1 or 3");
#if FASTOKD_X86
  TORCH_CHECK(capability() == Capability::kAvx512Bf16, "this CPU has no AVX-512 BF16");
  const int64_t B = x.size(0), parts = std::max<int64_t>(1, std::min<int64_t>(B, at::get_num_threads()));
  const int64_t size = s.O * kernel * kernel * s.C, strip = conv_strip(s);
  const auto floats = x.options().dtype(at::kFloat);
  Tensor sums = at::zeros({parts, size}, floats);
  Tensor scratch = at::empty({parts, conv_scratch(s, strip)}, floats.dtype(at::kInt));
  float* const w = sums.mutable_data_ptr<float>();
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = B * part / parts, last = B * (part + 1) / parts;
      conv_weight_grad_avx512(
          s, static_cast<const uint16_t*>(x.const_data_ptr()) + first * s.H * s.W * s.C,
          static_cast<const uint16_t*>(grad_y.const_data_ptr()) + first * s.OH * s.OW * s.O,
          last - first, strip,
          static_cast<uint32_t*>(scratch.mutable_data_ptr()) + part * scratch.size(1),
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

}  // namespace

TORCH_LIBRARY_IMPL(fastokd, CPU, m) { m.impl("conv_weight_grad", conv_weight_grad); }

}  // namespace fastokd
