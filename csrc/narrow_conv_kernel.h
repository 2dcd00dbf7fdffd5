// A 3x3 convolution with padding 1 of narrow bfloat16 maps, and the gradient of its input, row by row.
#pragma once

#include <stdint.h>

namespace fastokd {

// Which input pixel of a row output n reads for tap j = 0, 1, 2: n + j - 1 (kSame; the gradient too, with
// reversed taps), 2 n + j - 1 (kHalf: stride 2), or the p with n = 2 p + j - 1 (kTwice: the gradient of
// stride 2).
enum class Places { kSame, kHalf, kTwice };

// Maps of one image, channels last: input [H, W, inputs], output [OH, OW, outputs].
struct NarrowShape {
  Places places;
  int64_t H, W, inputs, OH, OW, outputs;
};

// Whether the kernel takes the shape: channels are multiples of 16, OW of 8.
bool narrow_conv_takes(const NarrowShape& s);

// Words of 4 bytes: of the packed weight, and of scratch memory for one thread.
int64_t narrow_conv_packed(const NarrowShape& s);
int64_t narrow_conv_scratch(const NarrowShape& s);

// From a weight [O, 3, 3, C] in memory: for the convolution (C inputs, O outputs), or for its
// gradient (O inputs, C outputs). Only where the CPU has AVX-512 and its BF16, as below.
void narrow_conv_pack_avx512(const NarrowShape& s, bool gradient, const uint16_t* weight,
                             uint32_t* packed);

// Rows [begin, end) of all images' outputs.
void narrow_conv_avx512(const NarrowShape& s, const uint16_t* x, const uint32_t* packed,
                        int64_t begin, int64_t end, uint32_t* scratch, uint16_t* y);

}  // namespace fastokd
