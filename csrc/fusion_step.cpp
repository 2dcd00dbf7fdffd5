// The dispatcher's side of FFSD's fusion step: samples shared among threads; partial sums are of a
// sample, and are added in the samples' order.
#include "fusion_step_kernel.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

#include "capability.h"

namespace fastokd {
namespace {

using at::Tensor;

// The maps and their concatenation.
class Layout {
 public:
  explicit Layout(at::TensorList maps) : maps_(maps) {
    TORCH_CHECK(!maps.empty() && maps[0].dim() == 4, "fusion_step: maps must be [B, C, H, W]");
    const Tensor& first = maps[0];
    const auto scalar = first.scalar_type();
    TORCH_CHECK(scalar == at::kFloat || scalar == at::kBFloat16 || scalar == at::kHalf,
                "fusion_step: maps must be float32, bfloat16 or float16, not ", scalar);
    for (const Tensor& map : maps) {
      TORCH_CHECK(map.sizes() == first.sizes() && map.scalar_type() == scalar &&
                      map.strides() == first.strides(),
                  "fusion_step: maps must have one shape, dtype and layout");
    }
    B = first.size(0), C = first.size(1);
    const int64_t H = first.size(2), W = first.size(3);
    TORCH_CHECK((C == 1 || first.stride(1) == 1) &&
                    (H == 1 || W == 1 || first.stride(2) == W * first.stride(3)),
                "fusion_step: maps must be channels-last");
    const Type type = scalar == at::kFloat      ? Type::kFloat
                      : scalar == at::kBFloat16 ? Type::kBFloat16
                                                : Type::kHalf;
    const int64_t M = static_cast<int64_t>(maps.size());
    shape = {M, C, H, W, W > 1 ? first.stride(3) : first.stride(2), type};
    K = M * C, P = H * W;
    padded = fusion_cells(shape) * kCell;
    TORCH_CHECK(C > 0 && B * P > 1, "fusion_step: more than one value a channel is needed, not maps of ",
                first.sizes());
  }

  // Channel k's place among numbers that come cell by cell.
  int64_t place(int64_t k) const { return k / C * (padded / shape.maps) + k % C; }
  std::vector<float> by_cells(const float* values_K) const {
    std::vector<float> out(padded);
    for (int64_t k = 0; k < K; ++k) out[place(k)] = values_K[k];
    return out;
  }
  std::vector<float> taps(const Tensor& weight_K133) const {
    TORCH_CHECK(weight_K133.sizes() == at::IntArrayRef({K, 1, 3, 3}) &&
                    weight_K133.is_floating_point(),
                "fusion_step: the weight must be floating point of shape [K, 1, 3, 3]");
    const Tensor weight = weight_K133.to(at::kFloat).contiguous();
    const float* const w = weight.const_data_ptr<float>();
    std::vector<float> out(padded * 9);
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t o = 0; o < 9; ++o) out[tap(k, o)] = w[k * 9 + o];
    }
    return out;
  }
  int64_t tap(int64_t k, int64_t o) const {
    return (place(k) / kCell * 9 + o) * kCell + place(k) % kCell;
  }

  Tensor empty() const {
    return at::empty({B, K, shape.height, shape.width}, maps_[0].options(),
                     at::MemoryFormat::ChannelsLast);
  }
  // Sample b of the concatenation, and of every map.
  const void* at(const Tensor& x, int64_t b) const {
    return static_cast<const char*>(x.const_data_ptr()) + b * P * K * x.element_size();
  }
  void* at(Tensor& x, int64_t b) const {
    return static_cast<char*>(x.mutable_data_ptr()) + b * P * K * x.element_size();
  }
  std::vector<const void*> maps(int64_t b) const {
    std::vector<const void*> out;
    for (const Tensor& map : maps_) {
      out.push_back(static_cast<const char*>(map.const_data_ptr()) +
                    b * map.stride(0) * map.element_size());
    }
    return out;
  }

  // Calls body(b, scratch) for every sample.
  template <class Body>
  void each_sample(bool needs_scratch, Body body) const {
    at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      const int64_t floats = needs_scratch ? fusion_scratch(shape) + kCell : 0;
      const std::unique_ptr<float[]> scratch(new float[floats]);
      const auto address = reinterpret_cast<uintptr_t>(scratch.get());
      float* const aligned = scratch.get() + (-address % 64) / sizeof(float);
      for (int64_t b = begin; b < end; ++b) body(b, aligned);
    });
  }

  FusionShape shape;
  int64_t B, C, K, P;
  int64_t padded;  // floats of a number a channel, cell by cell

 private:
  at::TensorList maps_;
};

const float* channels(const Tensor& x, int64_t K) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous() && x.dim() == 1 && x.size(0) == K,
              "fusion_step: the norm's tensors must be contiguous float32 of ", K, " channels");
  return x.const_data_ptr<float>();
}

std::tuple<Tensor, Tensor, Tensor> forward(at::TensorList maps, const Tensor& weight_K133,
                                           const Tensor& gamma_K, const Tensor& beta_K,
                                           Tensor running_mean_K, Tensor running_var_K,
                                           Tensor num_batches_tracked, double momentum,
                                           double eps) {
  const Layout in(maps);
  const int64_t K = in.K;
  channels(running_mean_K, K), channels(running_var_K, K);
  const float* const gamma = channels(gamma_K, K);
  const float* const beta = channels(beta_K, K);
  TORCH_CHECK(num_batches_tracked.scalar_type() == at::kLong && num_batches_tracked.numel() == 1,
              "fusion_step: num_batches_tracked must be one int64");
  Tensor z = in.empty(), y = in.empty();
  const std::vector<float> taps = in.taps(weight_K133);
  std::vector<float> means(in.B * in.padded), m2s(in.B * in.padded);
  in.each_sample(true, [&](int64_t b, float* scratch) {
    FASTOKD_DISPATCH(fusion_conv)(in.shape, in.maps(b).data(), taps.data(), scratch, in.at(z, b),
                                  &means[b * in.padded], &m2s[b * in.padded]);
  });

  std::vector<double> sum(in.padded), m2(in.padded);
  for (int64_t b = 0; b < in.B; ++b) {
    for (int64_t i = 0; i < in.padded; ++i) sum[i] += means[b * in.padded + i];
  }
  const double samples = static_cast<double>(in.B), pixels = static_cast<double>(in.P);
  for (int64_t b = 0; b < in.B; ++b) {
    for (int64_t i = 0; i < in.padded; ++i) {
      const double d = means[b * in.padded + i] - sum[i] / samples;
      m2[i] += m2s[b * in.padded + i] + pixels * d * d;
    }
  }
  Tensor saved_2K = at::empty({2, K}, gamma_K.options());
  float* const mean = saved_2K.mutable_data_ptr<float>();
  float* const rstd = mean + K;
  float* const running_mean = running_mean_K.mutable_data_ptr<float>();
  float* const running_var = running_var_K.mutable_data_ptr<float>();
  std::vector<float> scale(K);
  const double n = samples * pixels;
  for (int64_t k = 0; k < K; ++k) {
    const double m = sum[in.place(k)] / samples, squares = m2[in.place(k)];
    mean[k] = static_cast<float>(m);
    rstd[k] = static_cast<float>(1.0 / std::sqrt(squares / n + eps));
    scale[k] = gamma[k] * rstd[k];
    running_mean[k] = static_cast<float>((1.0 - momentum) * running_mean[k] + momentum * m);
    running_var[k] =
        static_cast<float>((1.0 - momentum) * running_var[k] + momentum * squares / (n - 1.0));
  }
  *num_batches_tracked.mutable_data_ptr<int64_t>() += 1;
  in.each_sample(false, [&](int64_t b, float*) {
    FASTOKD_DISPATCH(fusion_normalise)(in.shape, in.at(std::as_const(z), b), in.at(y, b), mean,
                                       scale.data(), beta);
  });
  return {y, z, saved_2K};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy_any, at::TensorList maps,
                                            const Tensor& weight_K133, const Tensor& gamma_K,
                                            const Tensor& beta_K, const Tensor& z,
                                            const Tensor& saved_2K, bool need_maps) {
  const Layout in(maps);
  const int64_t K = in.K, padded = in.padded;
  const Tensor dy = dy_any.contiguous(at::MemoryFormat::ChannelsLast);
  for (const Tensor* map : {&z, &dy}) {
    TORCH_CHECK(map->sizes() == at::IntArrayRef({in.B, K, in.shape.height, in.shape.width}) &&
                    map->scalar_type() == maps[0].scalar_type() &&
                    map->is_contiguous(at::MemoryFormat::ChannelsLast),
                "fusion_step: z and dy must have the maps' dtype, their height and width and ", K,
                " channels, z in channels-last");
  }
  TORCH_CHECK(saved_2K.scalar_type() == at::kFloat && saved_2K.is_contiguous() &&
                  saved_2K.sizes() == at::IntArrayRef({2, K}),
              "fusion_step: saved_2K isn't the forward's");
  const std::vector<float> taps = in.taps(weight_K133);
  const float* const saved = saved_2K.const_data_ptr<float>();
  const std::vector<float> mean = in.by_cells(saved), rstd = in.by_cells(saved + K),
                           gamma = in.by_cells(channels(gamma_K, K)),
                           beta = in.by_cells(channels(beta_K, K));
  std::vector<float> mean_g(padded), mean_gx(padded);
  const FusionNorm norm = {mean.data(), rstd.data(),   gamma.data(),
                           beta.data(), mean_g.data(), mean_gx.data()};

  std::vector<float> parts(in.B * padded * 9);
  in.each_sample(false, [&](int64_t b, float*) {
    float* const part = &parts[b * padded * 9];
    FASTOKD_DISPATCH(fusion_reduce)(in.shape, in.at(z, b), in.at(dy, b), norm, part,
                                    part + padded);
  });
  // Of `count` numbers of every sample.
  const auto total = [&](int64_t count) {
    std::vector<double> out(count);
    for (int64_t b = 0; b < in.B; ++b) {
      for (int64_t i = 0; i < count; ++i) out[i] += parts[b * padded * 9 + i];
    }
    return out;
  };
  const std::vector<double> sums = total(2 * padded);
  Tensor affine_2K = at::empty({2, K}, saved_2K.options());
  float* const affine = affine_2K.mutable_data_ptr<float>();
  for (int64_t k = 0; k < K; ++k) {
    affine[k] = static_cast<float>(sums[padded + in.place(k)]);
    affine[K + k] = static_cast<float>(sums[in.place(k)]);
  }
  const double n = static_cast<double>(in.B * in.P);
  for (int64_t i = 0; i < padded; ++i) {
    mean_g[i] = static_cast<float>(sums[i] / n);
    mean_gx[i] = static_cast<float>(sums[padded + i] / n);
  }

  Tensor dmaps = need_maps ? in.empty() : at::empty({0}, z.options());
  in.each_sample(true, [&](int64_t b, float* scratch) {
    FASTOKD_DISPATCH(fusion_gradient)(in.shape, in.maps(b).data(), taps.data(), in.at(z, b),
                                      in.at(dy, b), norm, scratch, &parts[b * padded * 9],
                                      need_maps ? in.at(dmaps, b) : nullptr);
  });
  const std::vector<double> dtaps = total(9 * padded);
  Tensor dweight_K9 = at::empty({K, 9}, saved_2K.options());
  float* const dweight = dweight_K9.mutable_data_ptr<float>();
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t o = 0; o < 9; ++o) dweight[k * 9 + o] = static_cast<float>(dtaps[in.tap(k, o)]);
  }
  return {dweight_K9, affine_2K, dmaps};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastokd, CPU, m) {
  m.impl("fusion_step", forward);
  m.impl("fusion_step_backward", backward);
}

}  // namespace fastokd
