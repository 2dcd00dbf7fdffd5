// The loops of fused_bn_act over blocks of rows, a table of them for each element type.
//
// A map [N, C, H, W] in channels-last memory is n = N*H*W rows of C channels. With m, v a channel's
// mean and (biased) variance, i = 1 / sqrt(v + eps), a = weight * i and b = bias - m * a:
//
//     y  = relu(a x + b + residual)
//     g  = dy where not y <= 0, else 0              (dy itself without the ReLU)
//     dx = a (g - sum(g) / n - (x - m) k)  with  k = i^2 sum(g (x - m)) / n
//        = a g - a k x + a (m k - sum(g) / n)
//     dweight = i sum(g (x - m)),  dbias = sum(g),  dresidual = g
//
// PyTorch's map is rounded to bf16 before the residual is added, this one once, at the end.
#pragma once

#include "kernel.h"

namespace fastokd {
namespace bn_act {

// What the ReLU's mask is taken from in the backward pass.
enum class Mask { kNone, kFromX, kFromY };

// A block of rows. `channels` repeats along `width`, its first multiple that fills whole tiles of
// registers: several rows of a narrow layer are taken at a time, without a ragged end.
struct Rows {
  int64_t count;
  int64_t channels;
  int64_t width;
};

// One value a channel, repeated up to `width`.
struct Affine {
  const float* mean;
  const float* scale;  // a
  const float* shift;  // b
};

struct Kernels {
  int64_t tile;     // what `width` is a multiple of
  int64_t element;  // bytes of one

  // The block's mean and sum of squared deviations of each channel. `scratch`: 2 * width floats.
  void (*stats)(Rows rows, const void* x, float* scratch, double* mean, double* m2);

  // y; `residual` may be null.
  void (*normalise)(Rows rows, const void* x, const void* residual, void* y, Affine affine,
                    bool relu);

  // The block's sum(g) and sum(g (x - m)) of each channel; writes g where `masked` is not null.
  void (*reduce)(Rows rows, Mask mask, const void* grad_y, const void* x, const void* y,
                 void* masked, Affine affine, float* scratch, double* sum_g, double* sum_gx);

  // dx = scale g + slope x + offset, the last two repeated up to `width` too.
  void (*grad_input)(Rows rows, Mask mask, const void* grad_y, const void* x, const void* y,
                     void* grad_x, Affine affine, const float* slope, const float* offset);
};

}  // namespace bn_act

// The loops over kFloat or kBFloat16; `bf16_instructions`: the processor has AVX512-BF16.
FASTOKD_DECLARE(const bn_act::Kernels*, bn_act_kernels, Type type, bool bf16_instructions);

}  // namespace fastokd
