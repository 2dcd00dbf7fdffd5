#include "correlation_distillation_kernel.h"

#include "target_rows.h"

namespace fastokd {
namespace {

constexpr double kEps = 1e-8;

inline Correlation correlation(double aa, double bb, double ab) {
  const double a = __builtin_sqrt(aa), b = __builtin_sqrt(bb);
  const double inverse = 1.0 / (a * b + kEps), rho = ab * inverse;
  // |a| has the gradient 0 where a is 0.
  return {rho, float(inverse), a == 0.0 ? 0.0f : float(rho * inverse * b / a)};
}

}  // namespace

void FASTOKD_KERNEL(softmax_row)(int64_t classes, Type type, const void* logits, float inverse,
                                 float* to) {
  typed(type, logits, [&](const auto* row) {
    scale_row(to, row, classes, row_max(row, classes), inverse);
  });
  Total total;
  for (int64_t i = 0; i < padded(classes); i += kLanes) {
    const Vec e = exp(load(to + i));
    total.add(e);
    store(to + i, e);
  }
  const float by = float(1.0 / whole(total));
  for (int64_t i = 0; i < padded(classes); i += kLanes) store(to + i, load(to + i) * by);
}

Correlation FASTOKD_KERNEL(correlate_row)(int64_t classes, const float* y, const float* u) {
  const float mean = 1.0f / float(classes);
  Total yy, uu, yu;
  each_vector(classes, mean, [&](int64_t, auto get, auto) {
    const Vec a = get(y) - mean, b = get(u) - mean;
    yy.add(a * a);
    uu.add(b * b);
    yu.add(a * b);
  });
  return correlation(whole(yy), whole(uu), whole(yu));
}

double FASTOKD_KERNEL(correlate_columns)(int64_t classes, int64_t samples, const float* y,
                                         const float* u, int64_t begin, int64_t end,
                                         float* saved) {
  const int64_t width = padded(classes);
  const float by = 1.0f / float(samples);
  double sum = 0.0;
  for (int64_t i = begin; i < end; i += kLanes) {
    Total y_total, u_total;
    for (int64_t b = 0; b < samples; ++b) {
      y_total.add(load(y + b * width + i));
      u_total.add(load(u + b * width + i));
    }
    const Vec y_mean = (y_total.high + y_total.low) * by;
    const Vec u_mean = (u_total.high + u_total.low) * by;
    Total yy, uu, yu, y_rest, u_rest;
    for (int64_t b = 0; b < samples; ++b) {
      const Vec p = load(y + b * width + i) - y_mean, q = load(u + b * width + i) - u_mean;
      y_rest.add(p);
      u_rest.add(q);
      yy.add(p * p);
      uu.add(q * q);
      yu.add(p * q);
    }
    store(saved + i, y_mean);
    store(saved + width + i, u_mean);
    const Vec yy_all = yy.high + yy.low, uu_all = uu.high + uu.low, yu_all = yu.high + yu.low;
    // What the means lack by their rounding: 1 / D and `along` may be large.
    const Vec y_more = (y_rest.high + y_rest.low) * by, u_more = (u_rest.high + u_rest.low) * by;
    for (int k = 0; k < kLanes; ++k) {
      const Correlation c = correlation(yy_all[k], uu_all[k], yu_all[k]);
      saved[2 * width + i + k] = c.inverse;
      saved[3 * width + i + k] = c.along;
      saved[4 * width + i + k] = c.along * y_more[k] - c.inverse * u_more[k];
      if (i + k < classes) sum += c.rho;
    }
  }
  return sum;
}

void FASTOKD_KERNEL(correlation_gradient)(const CorrelationOptions& o, const float* y,
                                          const float* u, Correlation row, const float* saved,
                                          float* scratch, float* gradient) {
  const int64_t width = padded(o.classes);
  const float mean = 1.0f / float(o.classes);
  Total inner;
  for (int64_t i = 0; i < width; i += kLanes) {
    const Vec p = load(y + i), q = load(u + i);
    const Vec in_row = (q - mean) * row.inverse - (p - mean) * row.along;
    const Vec in_column = (q - load(saved + width + i)) * load(saved + 2 * width + i) -
                          (p - load(saved + i)) * load(saved + 3 * width + i) +
                          load(saved + 4 * width + i);
    const Vec g = in_row * o.by_row + in_column * o.by_column;
    inner.add(p * g);
    store(scratch + i, g);
  }
  const float along = float(whole(inner));
  for (int64_t i = 0; i < width; i += kLanes) {
    store(scratch + i, load(y + i) * (load(scratch + i) - along));
  }
  write_row(gradient, scratch, o.classes);
}

}  // namespace fastokd
