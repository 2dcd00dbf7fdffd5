#include "fused_bn_act_kernel.h"

#include "fused_bn_act_vec.h"

namespace fastokd {
namespace bn_act {
namespace {

#if defined(__AVX512F__)
constexpr int kTile = 64;  // lanes whose state stays in registers: of 32
#else
constexpr int kTile = 2 * kLanes;  // of 16
#endif
constexpr int kMerge = 8;  // rows that join the running mean and deviations at once

// Calls body(first row, rows, first lane) so that each call is one tile wide: once where the rows
// are a tile wide, else tile by tile over strips of a few rows. Longer strips would load and store the
// tiles' state less often, but memory is slow where it isn't read in its order.
template <int64_t kWidth, int64_t kStrip, class Body>
FASTOKD_INLINE void for_tiles(int64_t rows, int64_t width, Body body) {
  if (width == kWidth) {
    body(0, rows, 0);
    return;
  }
  for (int64_t row = 0; row < rows; row += kStrip) {
    const int64_t count = rows - row < kStrip ? rows - row : kStrip;
    for (int64_t lane = 0; lane < width; lane += kWidth) body(row, count, lane);
  }
}

// Elements between what is read and what is asked for from memory: the processor's own prefetching
// stops at the end of a page.
constexpr int64_t kAhead = 1024;

template <class V, class E>
FASTOKD_INLINE V fetch(const E* p) {
  __builtin_prefetch(p + kAhead);
  return V::load(p);
}

// T groups of lanes side by side: a tile of one value a channel, or of sums.
template <class V, int T>
struct Tile {
  V at[T];
  template <class E>
  FASTOKD_INLINE explicit Tile(const E* p) {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) at[t] = V::load(p + t * V::kLanes);
  }
  FASTOKD_INLINE void store(float* p) const {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) at[t].store(p + t * V::kLanes);
  }
};

// Chan, Golub and LeVeque's update in registers: G rows' mean and squared deviations are taken by
// themselves, then merged with those of the `seen` rows before. Means are less `origin`, one of the
// values: as exact where the mean is a thousand deviations from zero as where it is zero.
template <int G, class V, int T, class E>
FASTOKD_INLINE void merge_rows(const E* x, int64_t stride, int64_t seen, const Tile<V, T>& origin,
                               Tile<V, T>& mean, Tile<V, T>& m2) {
  const float share = static_cast<float>(G) / static_cast<float>(seen + G);
  const V to_mean = V::splat(share);
  const V to_m2 = V::splat(static_cast<float>(seen) * share);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    V v[G];
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g) v[g] = fetch<V>(x + g * stride + t * V::kLanes);
    V m = v[0];
#pragma GCC unroll 8
    for (int g = 1; g < G; ++g) m = m + v[g];
    m = m * V::splat(1.0f / G);
    V d = v[0] - m;
    V q = d * d;
#pragma GCC unroll 8
    for (int g = 1; g < G; ++g) {
      d = v[g] - m;
      q = fma(d, d, q);
    }
    const V step = (m - origin.at[t]) - mean.at[t];
    mean.at[t] = fma(step, to_mean, mean.at[t]);
    m2.at[t] = m2.at[t] + fma(step * step, to_m2, q);
  }
}

// The mean less the first row's value, and the sum of squared deviations, of each lane.
template <class V, int T, class E>
void stats_rows(const E* x, int64_t rows, int64_t width, float* mean_out, float* m2_out) {
  for (int64_t i = 0; i < width; ++i) mean_out[i] = m2_out[i] = 0.0f;
  for_tiles<T * V::kLanes, kMerge>(rows, width, [&](int64_t row, int64_t count, int64_t lane) {
    const Tile<V, T> origin(x + lane);
    Tile<V, T> mean(mean_out + lane), m2(m2_out + lane);
    const E* p = x + row * width + lane;
    int64_t i = 0;
    for (; i + kMerge <= count; i += kMerge) {
      merge_rows<kMerge>(p + i * width, width, row + i, origin, mean, m2);
    }
    for (; i < count; ++i) merge_rows<1>(p + i * width, width, row + i, origin, mean, m2);
    mean.store(mean_out + lane);
    m2.store(m2_out + lane);
  });
}

template <class V, int T, bool kResidual, bool kRelu, class E>
void normalise_rows(const E* x, const E* residual, E* y, int64_t rows, int64_t width,
                    Affine affine) {
  for_tiles<T * V::kLanes, 2>(rows, width, [&](int64_t row, int64_t count, int64_t lane) {
    const Tile<V, T> a(affine.scale + lane), b(affine.shift + lane);
    int64_t at = row * width + lane;
    for (int64_t i = 0; i < count; ++i, at += width) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const int64_t p = at + t * V::kLanes;
        V v = fma(fetch<V>(x + p), a.at[t], b.at[t]);
        if constexpr (kResidual) v = v + fetch<V>(residual + p);
        if constexpr (kRelu) v = relu(v);
        v.store(y + p);
      }
    }
  });
}

// The gradient that reaches the normalised map: dy where the ReLU let y through. kFromX repeats
// the forward's arithmetic to the bit, and so finds the forward's sign.
template <Mask kMask, class V, class E>
FASTOKD_INLINE V masked_gradient(V grad, V x, const E* y, int64_t at, V scale, V shift) {
  if constexpr (kMask == Mask::kFromX) return keep(fma(x, scale, shift), grad);
  if constexpr (kMask == Mask::kFromY) return keep(fetch<V>(y + at), grad);
  return grad;
}

template <class V, int T, Mask kMask, bool kWrite, class E>
void reduce_rows(const E* grad_y, const E* x, const E* y, E* masked, int64_t rows, int64_t width,
                 Affine affine, float* sum_g, float* sum_gx) {
  for (int64_t i = 0; i < width; ++i) sum_g[i] = sum_gx[i] = 0.0f;
  for_tiles<T * V::kLanes, kMerge>(rows, width, [&](int64_t row, int64_t count, int64_t lane) {
    const Tile<V, T> mean(affine.mean + lane), a(affine.scale + lane), b(affine.shift + lane);
    Tile<V, T> g_sum(sum_g + lane), gx_sum(sum_gx + lane);
    int64_t at = row * width + lane;
    for (int64_t i = 0; i < count; ++i, at += width) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const int64_t p = at + t * V::kLanes;
        const V v = fetch<V>(x + p);
        const V g = masked_gradient<kMask>(fetch<V>(grad_y + p), v, y, p, a.at[t], b.at[t]);
        if constexpr (kWrite) g.store(masked + p);
        g_sum.at[t] = g_sum.at[t] + g;
        gx_sum.at[t] = fma(g, v - mean.at[t], gx_sum.at[t]);
      }
    }
    g_sum.store(sum_g + lane);
    gx_sum.store(sum_gx + lane);
  });
}

template <class V, int T, Mask kMask, class E>
void grad_input_rows(const E* grad_y, const E* x, const E* y, E* grad_x, int64_t rows,
                     int64_t width, Affine affine, const float* slope, const float* offset) {
  for_tiles<T * V::kLanes, 2>(rows, width, [&](int64_t row, int64_t count, int64_t lane) {
    const Tile<V, T> a(affine.scale + lane), b(affine.shift + lane);
    const Tile<V, T> k(slope + lane), c(offset + lane);
    int64_t at = row * width + lane;
    for (int64_t i = 0; i < count; ++i, at += width) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const int64_t p = at + t * V::kLanes;
        const V v = fetch<V>(x + p);
        const V g = masked_gradient<kMask>(fetch<V>(grad_y + p), v, y, p, a.at[t], b.at[t]);
        fma(g, a.at[t], fma(v, k.at[t], c.at[t])).store(grad_x + p);
      }
    }
  });
}

// A block of rows of E as whole rows of `width` lanes, taken by V, and the ragged rest, in rows of
// `channels` lanes, taken one by one.
template <class V, class E>
struct Loops {
  static constexpr int kGroups = kTile / V::kLanes;

  struct Split {
    int64_t wide;
    int64_t rest;
    int64_t offset;
    explicit Split(Rows r)
        : wide(r.count * r.channels / r.width),
          rest(r.count - wide * (r.width / r.channels)),
          offset(wide * r.width) {}
  };

  static const E* from(const void* p, int64_t offset = 0) {
    return p ? static_cast<const E*>(p) + offset : nullptr;
  }
  static E* to(void* p, int64_t offset = 0) { return p ? static_cast<E*>(p) + offset : nullptr; }

  static void stats(Rows r, const void* x, float* scratch, double* mean, double* m2) {
    const Split split(r);
    float* const part_mean = scratch;
    float* const part_m2 = scratch + r.width;
    for (int64_t c = 0; c < r.channels; ++c) mean[c] = m2[c] = 0.0;
    double seen = 0.0;
    const auto merge = [&](const E* origin, int64_t lane, int64_t rows) {
      const double count = static_cast<double>(rows);
      const double share = count / (seen + count);
      for (int64_t c = 0; c < r.channels; ++c) {
        const double first = Scalar::load(origin + lane + c).v;
        const double step = first + part_mean[lane + c] - mean[c];
        mean[c] += step * share;
        m2[c] += part_m2[lane + c] + step * step * (seen * share);
      }
      seen += count;
    };
    if (split.wide > 0) {
      stats_rows<V, kGroups>(from(x), split.wide, r.width, part_mean, part_m2);
      for (int64_t lane = 0; lane < r.width; lane += r.channels) {
        merge(from(x), lane, split.wide);
      }
    }
    if (split.rest > 0) {
      stats_rows<Scalar, 1>(from(x, split.offset), split.rest, r.channels, part_mean, part_m2);
      merge(from(x, split.offset), 0, split.rest);
    }
  }

  template <bool kResidual, bool kRelu>
  static void normalise_as(Rows r, const void* x, const void* residual, void* y, Affine affine) {
    const Split split(r);
    const int64_t o = split.offset;
    normalise_rows<V, kGroups, kResidual, kRelu>(from(x), from(residual), to(y), split.wide,
                                                 r.width, affine);
    normalise_rows<Scalar, 1, kResidual, kRelu>(from(x, o), from(residual, o), to(y, o),
                                                split.rest, r.channels, affine);
  }

  static void normalise(Rows r, const void* x, const void* residual, void* y, Affine affine,
                        bool relu) {
    static constexpr decltype(&normalise_as<false, false>) kForms[2][2] = {
        {normalise_as<false, false>, normalise_as<false, true>},
        {normalise_as<true, false>, normalise_as<true, true>},
    };
    kForms[residual != nullptr][relu](r, x, residual, y, affine);
  }

  template <Mask kMask, bool kWrite>
  static void reduce_as(Rows r, const void* grad_y, const void* x, const void* y, void* masked,
                        Affine affine, float* scratch, double* sum_g, double* sum_gx) {
    const Split split(r);
    const int64_t o = split.offset;
    float* const part_g = scratch;
    float* const part_gx = scratch + r.width;
    for (int64_t c = 0; c < r.channels; ++c) sum_g[c] = sum_gx[c] = 0.0;
    const auto add = [&](int64_t lane) {
      for (int64_t c = 0; c < r.channels; ++c) {
        sum_g[c] += part_g[lane + c];
        sum_gx[c] += part_gx[lane + c];
      }
    };
    if (split.wide > 0) {
      reduce_rows<V, kGroups, kMask, kWrite>(from(grad_y), from(x), from(y), to(masked),
                                             split.wide, r.width, affine, part_g, part_gx);
      for (int64_t lane = 0; lane < r.width; lane += r.channels) add(lane);
    }
    if (split.rest > 0) {
      reduce_rows<Scalar, 1, kMask, kWrite>(from(grad_y, o), from(x, o), from(y, o), to(masked, o),
                                            split.rest, r.channels, affine, part_g, part_gx);
      add(0);
    }
  }

  static void reduce(Rows r, Mask mask, const void* grad_y, const void* x, const void* y,
                     void* masked, Affine affine, float* scratch, double* sum_g, double* sum_gx) {
    static constexpr decltype(&reduce_as<Mask::kNone, false>) kForms[3][2] = {
        {reduce_as<Mask::kNone, false>, reduce_as<Mask::kNone, true>},
        {reduce_as<Mask::kFromX, false>, reduce_as<Mask::kFromX, true>},
        {reduce_as<Mask::kFromY, false>, reduce_as<Mask::kFromY, true>},
    };
    kForms[static_cast<int>(mask)][masked != nullptr](r, grad_y, x, y, masked, affine, scratch,
                                                      sum_g, sum_gx);
  }

  template <Mask kMask>
  static void grad_input_as(Rows r, const void* grad_y, const void* x, const void* y, void* grad_x,
                            Affine affine, const float* slope, const float* offset) {
    const Split split(r);
    const int64_t o = split.offset;
    grad_input_rows<V, kGroups, kMask>(from(grad_y), from(x), from(y), to(grad_x), split.wide,
                                       r.width, affine, slope, offset);
    grad_input_rows<Scalar, 1, kMask>(from(grad_y, o), from(x, o), from(y, o), to(grad_x, o),
                                      split.rest, r.channels, affine, slope, offset);
  }

  static void grad_input(Rows r, Mask mask, const void* grad_y, const void* x, const void* y,
                         void* grad_x, Affine affine, const float* slope, const float* offset) {
    static constexpr decltype(&grad_input_as<Mask::kNone>) kForms[3] = {
        grad_input_as<Mask::kNone>, grad_input_as<Mask::kFromX>, grad_input_as<Mask::kFromY>};
    kForms[static_cast<int>(mask)](r, grad_y, x, y, grad_x, affine, slope, offset);
  }

  static constexpr Kernels kTable = {kTile,     sizeof(E), stats,
                                     normalise, reduce,    grad_input};
};

}  // namespace
}  // namespace bn_act

const bn_act::Kernels* FASTOKD_KERNEL(bn_act_kernels)(Type type, bool bf16_instructions) {
  using namespace bn_act;
  if (type != Type::kBFloat16) return &Loops<Floats, float>::kTable;
#if defined(__AVX512F__)
  if (bf16_instructions) return &Loops<NativeHalves, bf16_t>::kTable;
#else
  (void)bf16_instructions;
#endif
  return &Loops<Halves, bf16_t>::kTable;
}

}  // namespace fastokd
