// The fused loss of ops/mixture_distillation.py and all its gradients, a range of samples at a time.
#pragma once

#include "kernel.h"

namespace fastokd {

enum class Mix : int32_t { kLogits, kProbs, kPairwise };

constexpr int kMaxSources = 16;

// Rows of classes, strides in elements; a row itself is dense.
struct SourceRows {
  const void* data;
  int64_t source_stride, sample_stride;
  Type type;
};

// A fused loss's arguments, from the operator to the kernel.
struct Loss {
  int64_t batch, classes;
  int students, extras;
  SourceRows logits, extra;

  const int64_t* labels;     // ids, or null:
  const float* soft_labels;  // [batch, classes]
  float smoothing;
  // Null where a sample has one class id, and where every sample counts alike.
  const int64_t* labels2;
  const float *share2, *sample_weight;

  // Scores by strides or, where there are peers, queries and keys [batch, peers, width] whose
  // products they are. The pointer of a tensor without elements is null.
  const float* scores;
  int64_t score_strides[3];  // of samples, students, sources
  const float *query, *key;
  int peers, width;

  float ce_weight[kMaxSources], kd_weight[kMaxSources], mixture_weight[kMaxSources];
  bool has_mixture_ce, detach_targets;
  float temperature;
  Mix mix;

  float* losses;  // [3, students, batch]: CE, kd, mixture CE
  // Null where not asked. Those of the rows are dense, in grad_*_type; the others float.
  void *grad_logits, *grad_extra;
  Type grad_logits_type, grad_extra_type;
  float* grad_scores;  // [batch, students, sources], of batch-free scores too
  float *grad_query, *grad_key;
};

// Floats of scratch memory, aligned to 64 bytes, that a thread needs: rows as Sample lays them out.
static inline int64_t mixture_distillation_scratch(const Loss& loss) {
  const int64_t sources = loss.students + loss.extras;
  const int64_t row = loss.classes > loss.width ? loss.classes : loss.width;
  return (row + 15) / 16 * 16 * (2 + 3 * sources + 4 * loss.students);
}

FASTOKD_DECLARE(void, mixture_distillation_range, const Loss& loss, int64_t begin, int64_t end,
                float* scratch);

}  // namespace fastokd
