// The loops of FFSD's whole-map transfer over one sample, both maps in the same order of memory.
#pragma once

#include "kernel.h"

namespace fastokd {

// What a sample's gradients need: 1 / nx, 1 / ny, and u . (u - v), v . (v - u), the latter two 0
// where their norm is below eps.
struct FeatureSample {
  float ix, iy, along_x, along_y;
};

// x . x, y . y, x . y and (x - y) . (x - y).
FASTOKD_DECLARE(void, feature_sums, Type type, const void* x, const void* y, int64_t n,
                double* sums);

// scale ((u - v) - u along_x) / nx, and the same of y; a null pointer is not written.
FASTOKD_DECLARE(void, feature_gradient, Type type, const void* x, const void* y, int64_t n,
                FeatureSample sample, float scale, void* grad_x, void* grad_y);

}  // namespace fastokd
