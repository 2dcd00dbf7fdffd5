// DIST's loops over rows and columns of probabilities: ops/correlation_distillation.py has the equations.
#pragma once

#include "kernel.h"

namespace fastokd {

// A correlation rho = a.b / D with D = |a| |b| + eps has the gradient b / D - a along in a.
struct Correlation {
  double rho;
  float inverse, along;  // 1 / D
};

struct CorrelationOptions {
  int64_t classes;
  float by_row, by_column;  // -T beta / B and -T gamma / C
};

// to = softmax(logits * inverse), 0 after the last class; `to` is a padded row.
FASTOKD_DECLARE(void, softmax_row, int64_t classes, Type type, const void* logits, float inverse,
                float* to);

// Of a student's row y and the target's u.
FASTOKD_DECLARE(Correlation, correlate_row, int64_t classes, const float* y, const float* u);

// Of the columns begin to end of `samples` padded rows: the sum of rho over those before `classes`. Of
// each column `saved` gets both means, 1 / D, `along` and what the means' rounding takes from the gradient, in
// rows of the padded width.
FASTOKD_DECLARE(double, correlate_columns, int64_t classes, int64_t samples, const float* y,
                const float* u, int64_t begin, int64_t end, float* saved);

// The gradient in a sample's logits. `scratch` is a padded row.
FASTOKD_DECLARE(void, correlation_gradient, const CorrelationOptions& o, const float* y,
                const float* u, Correlation row, const float* saved, float* scratch, float* gradient);

}  // namespace fastokd
