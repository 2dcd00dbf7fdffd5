// The loops of FFSD's attention, one sample at a time; the equations are in ops/attention.py.
//
// Rows of pixels (a, u, g, ...) are padded with zeros to a multiple of kRowPad floats.
#pragma once

#include "kernel.h"

namespace fastokd {

constexpr int64_t kRowPad = 16;

// One sample of a map. Channels-last has stride_c 1, channels-first stride_p 1; strides count
// elements.
struct MapSample {
  void* data;
  Type type;
  int64_t channels, pixels, stride_p, stride_c;
};

// a = A(x).
FASTOKD_DECLARE(void, attention_energy, const MapSample& x, float* a);

// a becomes u = a / max(||a||, eps); returns ||a||.
FASTOKD_DECLARE(float, attention_normalise, float* a, int64_t pixels);

// target = (r/2 - u) sign(u - threshold) + r/2, the threshold the (pixels / 3)-th smallest of u.
FASTOKD_DECLARE(void, attention_target, const float* u, float r, int64_t pixels, float* target);

// g = scale (u - v); returns the sum of (u - v)^2.
FASTOKD_DECLARE(float, attention_difference, const float* u, const float* v, int64_t pixels,
                float scale, float* g);

// g, a gradient by u, becomes 2 / channels times the gradient by a.
FASTOKD_DECLARE(void, attention_gradient, const float* u, float r, int64_t pixels,
                int64_t channels, float* g);

// out = x * s * factor, or x + s * factor; s counts a number a pixel, without padding.
FASTOKD_DECLARE(void, attention_scale, const MapSample& x, const float* s, float factor,
                const MapSample& out);
FASTOKD_DECLARE(void, attention_shift, const MapSample& x, const float* s, float factor,
                const MapSample& out);

}  // namespace fastokd
