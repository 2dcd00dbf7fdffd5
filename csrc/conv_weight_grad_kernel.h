// The gradient of a convolution's weight from bfloat16 maps, summed in float.
#pragma once

#include <stdint.h>

namespace fastokd {

// Maps of one image, channels last: x [H, W, C], grad_y [OH, OW, O]; a K x K kernel, K 1 or 3.
struct ConvShape {
  int64_t H, W, C, OH, OW, O, K, stride, padding;
};

// A part of the weight, so small that its sums stay in the L2 cache: outputs from o on, inputs from
// c on, both multiples of 16, of at most kConvBlock each: scratch memory is for those.
struct ConvBlock {
  int64_t o, outputs, c, inputs;
};
constexpr int64_t kConvBlock = 64;

// Words of 4 bytes of scratch memory for one call.
int64_t conv_weight_grad_scratch(const ConvShape& s, int64_t images);

// The block's part of grad_w [O, K, K, C], over rows [top, bottom) of `images` images' outputs. A
// place outside x is a zero that is multiplied: where grad_y isn't finite the sum is NaN. Only where
// the CPU has AVX-512 and its BF16.
void conv_weight_grad_avx512(const ConvShape& s, const ConvBlock& block, const uint16_t* x,
                             const uint16_t* grad_y, int64_t images, int64_t top, int64_t bottom,
                             uint32_t* scratch, float* grad_w);

}  // namespace fastokd
