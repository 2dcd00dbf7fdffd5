// The gradient of a convolution's weight over a run of images, for narrow layers in bfloat16.
#pragma once

#include <stdint.h>

namespace fastokd {

// Maps of one image, channels last: x [H, W, C], grad_y [OH, OW, O], a square kernel of side K.
struct ConvShape {
  int64_t H, W, C, OH, OW, O, K, stride, padding;
};

// Rows of grad_y that are taken at once, so that their pairs and those of x stay in the L1 cache.
int64_t conv_strip(const ConvShape& s);

// Words of 4 bytes that a strip needs as scratch memory.
int64_t conv_scratch(const ConvShape& s, int64_t strip);

// Adds the sum over `images` to grad_w [O, K, K, C]. Only where the CPU has AVX-512 and its BF16;
// C and O are multiples of 16, K is 1 or 3.
void conv_weight_grad_avx512(const ConvShape& s, const uint16_t* x, const uint16_t* grad_y,
                             int64_t images, int64_t strip, uint32_t* scratch, float* grad_w);

}  // namespace fastokd
