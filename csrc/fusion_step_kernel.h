// The loops of FFSD's fusion step over one sample; the equations are in ops/fusion_step.py.
//
// The maps' concatenation is taken in cells of up to kCell channels of one map. Numbers a channel
// (weights, statistics) come cell by cell, kCell each, zeros past a map's last channel.
#pragma once

#include "kernel.h"

namespace fastokd {

constexpr int64_t kCell = 16;

struct FusionShape {
  int64_t maps, channels;  // channels of one map
  int64_t height, width;
  int64_t stride_x;  // from a pixel of a map to the next; of all else it is maps * channels
  Type type;
};

static inline int64_t fusion_cells(const FusionShape& shape) {
  return shape.maps * ((shape.channels + kCell - 1) / kCell);
}

// Floats of scratch: two images with a border for each cell.
static inline int64_t fusion_scratch(const FusionShape& shape) {
  return 2 * fusion_cells(shape) * (shape.height + 2) * (shape.width + 2) * kCell;
}

struct FusionNorm {
  const float *mean, *rstd, *gamma, *beta;
  const float *mean_g, *mean_gx;  // over batch and pixels: of g and of g xhat
};

// z = depthwise 3x3 of the maps (taps: [cells, 9, kCell]); mean and squared deviations of what was
// stored, over the sample's pixels.
FASTOKD_DECLARE(void, fusion_conv, const FusionShape& shape, const void* const* maps,
                const float* taps, float* scratch, void* z, float* mean, float* m2);

// y = relu(gamma (z - mean) rstd + beta); mean, scale = gamma rstd and beta dense here.
FASTOKD_DECLARE(void, fusion_normalise, const FusionShape& shape, const void* z, void* y,
                const float* mean, const float* scale, const float* beta);

// The sums of g and of g xhat over the sample's pixels.
FASTOKD_DECLARE(void, fusion_reduce, const FusionShape& shape, const void* z, const void* grad_y,
                const FusionNorm& norm, float* sum_g, float* sum_gx);

// The taps' gradient from this sample and, where grad_maps is not null, the maps'.
FASTOKD_DECLARE(void, fusion_gradient, const FusionShape& shape, const void* const* maps,
                const float* taps, const void* z, const void* grad_y, const FusionNorm& norm,
                float* scratch, float* grad_taps, void* grad_maps);

}  // namespace fastokd
