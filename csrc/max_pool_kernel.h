// 3x3 max pooling with padding 1, and its gradient, over rows of channels-last maps.
#pragma once

#include "kernel.h"

namespace fastokd {

// One image: input [H, W, C], output [OH, OW, C]; C is a multiple of 16.
struct PoolShape {
  int64_t H, W, C, OH, OW, stride;
};

// Rows [begin, end) of all images' outputs: y, and the tap, 0 to 8, of each maximum.
FASTOKD_DECLARE(void, max_pool, Type type, const PoolShape& s, const void* x, void* y, uint8_t* taps,
                int64_t begin, int64_t end);

// Rows [begin, end) of all images' inputs: their gradients.
FASTOKD_DECLARE(void, max_pool_gradient, Type type, const PoolShape& s, const void* grad_y,
                const uint8_t* taps, void* grad_x, int64_t begin, int64_t end);

}  // namespace fastokd
