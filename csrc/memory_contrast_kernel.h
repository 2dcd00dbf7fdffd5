// The loops of MCL's similarities with rows of a memory, over a stretch of one sample's rows.
#pragma once

#include "kernel.h"

namespace fastokd {

// Rows index[0, K) of a memory [N, D], every index in [0, N); S anchors.
struct MemoryRows {
  Type type;
  const void* memory;
  const int64_t* index;
  int64_t K, D, S;
};

// to[a to_step + k] = scale x_a . row_k; anchor a is at x + a x_step.
FASTOKD_DECLARE(void, memory_dots, const MemoryRows& rows, const float* x, int64_t x_step,
                float scale, float* to, int64_t to_step);

// sums[a, D] += scale sum_k grad[a grad_step + k] row_k.
FASTOKD_DECLARE(void, memory_sums, const MemoryRows& rows, const float* grad, int64_t grad_step,
                float scale, float* sums);

}  // namespace fastokd
