// DKD of one student and sample: ops/decoupled_distillation.py has the equations.
#pragma once

#include "kernel.h"

namespace fastokd {

struct DecoupledOptions {
  int64_t classes;
  float alpha, beta, temperature, inverse;  // inverse: 1 / temperature
  float scale;                              // of the gradient: temperature / B
  Type logits, target;
};

// The loss of a sample, without the mean over the batch. `scratch` has room for two padded rows;
// `gradient` may be null.
FASTOKD_DECLARE(double, decoupled_row, const DecoupledOptions& o, const void* logits,
                const void* target, int64_t label, float* scratch, float* gradient);

}  // namespace fastokd
