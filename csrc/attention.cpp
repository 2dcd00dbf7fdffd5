// The dispatcher's side of FFSD's attention: threads take samples, of a small batch also bands of a sample's
// pixels. Pixels are summed over channels alone, so no result depends on the number of threads.
#include "attention_kernel.h"

#include <ATen/ops/empty_like.h>

#include <numeric>
#include <vector>

#include "op.h"

namespace fastokd {
namespace {

// A map by samples.
class Map {
 public:
  explicit Map(const Tensor& x) {
    TORCH_CHECK(x.dim() == 4, "a map must be [B, C, H, W]");
    stride_b_ = x.stride(0);
    first_.type = type_of(x, "a map");
    const int64_t C = x.size(1), H = x.size(2), W = x.size(3);
    first_.data = const_cast<void*>(x.const_data_ptr());
    first_.channels = C;
    first_.pixels = H * W;
    first_.stride_p = W > 1 ? x.stride(3) : x.stride(2);
    first_.stride_c = C > 1 ? x.stride(1) : 1;
    TORCH_CHECK(H == 1 || W == 1 || x.stride(2) == W * x.stride(3),
                "a map's pixels must be evenly spaced");
    TORCH_CHECK(first_.stride_c == 1 || first_.stride_p == 1 || H * W == 1,
                "a map must be channels-last or channels-first");
    element_ = x.element_size();
  }

  MapSample operator[](int64_t b) const {
    MapSample sample = first_;
    sample.data = static_cast<char*>(first_.data) + b * stride_b_ * element_;
    return sample;
  }
  // Pixels [begin, end) of sample b.
  MapSample band(int64_t b, int64_t begin, int64_t end) const {
    MapSample part = (*this)[b];
    part.data = static_cast<char*>(part.data) + begin * part.stride_p * element_;
    part.pixels = end - begin;
    return part;
  }
  int64_t pixels() const { return first_.pixels; }
  int64_t channels() const { return first_.channels; }
  // Floats of a padded row of pixels.
  int64_t row() const { return (first_.pixels + kRowPad - 1) / kRowPad * kRowPad; }

 private:
  MapSample first_;
  int64_t stride_b_ = 0, element_ = 0;
};

// Calls body(b, scratch) for every sample; scratch: `rows` rows of pixels of the thread's own.
template <class Body>
void each_sample(int64_t batch, int64_t rows, int64_t row, Body body) {
  parallel(batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(rows * row);
    for (int64_t b = begin; b < end; ++b) body(b, scratch.data());
  });
}

// Calls body(b, first pixel, last + 1) for bands of whole groups of kRowPad pixels of every sample.
template <class Body>
void each_band(int64_t batch, int64_t pixels, Body body) {
  const int64_t groups = (pixels + kRowPad - 1) / kRowPad, bands = pieces(batch, groups);
  parallel(batch * bands, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t band = n % bands;
      body(n / bands, groups * band / bands * kRowPad,
           std::min(pixels, groups * (band + 1) / bands * kRowPad));
    }
  });
}

// The energies of every sample's pixels, in padded rows.
std::vector<float> energies(const Map& x, int64_t batch) {
  std::vector<float> rows(batch * x.row());
  each_band(batch, x.pixels(), [&](int64_t b, int64_t begin, int64_t end) {
    FASTOKD_DISPATCH(attention_energy)(x.band(b, begin, end), rows.data() + b * x.row() + begin);
  });
  return rows;
}

Tensor rows_of(const Tensor& x, bool asked) {
  return asked ? new_float({x.size(0), x.size(2) * x.size(3)}) : new_float({0});
}

void copy_row(const float* from, int64_t pixels, int64_t row, float* to) {
  std::fill(std::copy(from, from + pixels, to), to + row, 0.0f);
}

std::tuple<Tensor, Tensor> attention_map(const Tensor& x_BCHW) {
  const Map x(x_BCHW);
  const int64_t B = x_BCHW.size(0), P = x.pixels();
  Tensor u_BP = rows_of(x_BCHW, true);
  Tensor r_B = new_float({B});
  float* const u = u_BP.mutable_data_ptr<float>();
  float* const r = r_B.mutable_data_ptr<float>();
  std::vector<float> energy = energies(x, B);
  each_sample(B, 0, x.row(), [&](int64_t b, float*) {
    float* const a = energy.data() + b * x.row();
    r[b] = FASTOKD_DISPATCH(attention_normalise)(a, P);
    std::copy(a, a + P, u + b * P);
  });
  return {u_BP, r_B};
}

Tensor attention_map_backward(const Tensor& x_BCHW, const Tensor& u_BP, const Tensor& r_B,
                              const Tensor& grad_BP) {
  Tensor out_BCHW = at::empty_like(x_BCHW);
  const Map x(x_BCHW), out(out_BCHW);
  const int64_t P = x.pixels();
  const Tensor grad = grad_BP.contiguous();
  const int64_t B = x_BCHW.size(0);
  const float* const u = kept(u_BP, {B, P}, "u_BP");
  const float* const r = kept(r_B, {B}, "r_B");
  const float* const g = kept(grad, {B, P}, "grad_BP");
  std::vector<float> scales(B * x.row());
  each_sample(B, 1, x.row(), [&](int64_t b, float* row_u) {
    float* const row_g = scales.data() + b * x.row();
    copy_row(u + b * P, P, x.row(), row_u);
    copy_row(g + b * P, P, x.row(), row_g);
    FASTOKD_DISPATCH(attention_gradient)(row_u, r[b], P, x.channels(), row_g);
  });
  each_band(B, P, [&](int64_t b, int64_t begin, int64_t end) {
    FASTOKD_DISPATCH(attention_scale)(x.band(b, begin, end), scales.data() + b * x.row() + begin,
                                      1.0f, out.band(b, begin, end));
  });
  return out_BCHW;
}

std::tuple<Tensor, Tensor, Tensor> attention_pair(const Tensor& x_BCHW, const Tensor& y_BCHW,
                                                  bool shift, bool need_x, bool need_y) {
  const Map x(x_BCHW), y(y_BCHW);
  TORCH_CHECK(x_BCHW.size(0) == y_BCHW.size(0) && x.pixels() == y.pixels(),
              "the maps must have one batch and one number of pixels");
  const int64_t B = x_BCHW.size(0), P = x.pixels(), row = x.row();
  const double scale = 1.0 / static_cast<double>(std::max<int64_t>(B * P, 1));
  Tensor sx_BP = rows_of(x_BCHW, need_x), sy_BP = rows_of(y_BCHW, need_y);
  float* const sx = sx_BP.mutable_data_ptr<float>();
  float* const sy = sy_BP.mutable_data_ptr<float>();
  std::vector<double> parts(B);
  std::vector<float> energy_x = energies(x, B), energy_y = energies(y, B);
  each_sample(B, 2, row, [&](int64_t b, float* target) {
    float *const u = energy_x.data() + b * row, *const v = energy_y.data() + b * row;
    float* const g = target + row;
    const float rx = FASTOKD_DISPATCH(attention_normalise)(u, P);
    const float ry = FASTOKD_DISPATCH(attention_normalise)(v, P);
    if (shift) FASTOKD_DISPATCH(attention_target)(v, ry, P, target);
    const float by = static_cast<float>(2.0 * scale);
    const float* const other = shift ? target : v;
    parts[b] = FASTOKD_DISPATCH(attention_difference)(u, other, P, by, g);
    if (need_x) {
      FASTOKD_DISPATCH(attention_gradient)(u, rx, P, x.channels(), g);
      std::copy(g, g + P, sx + b * P);
    }
    if (need_y) {
      FASTOKD_DISPATCH(attention_difference)(v, u, P, by, g);
      FASTOKD_DISPATCH(attention_gradient)(v, ry, P, y.channels(), g);
      std::copy(g, g + P, sy + b * P);
    }
  });
  const double total = std::accumulate(parts.begin(), parts.end(), 0.0);
  return {new_number(total * scale), sx_BP, sy_BP};
}

Tensor attention_pair_backward(const Tensor& x_BCHW, const Tensor& s_BP, const Tensor& incoming) {
  Tensor out_BCHW = at::empty_like(x_BCHW);
  const Map x(x_BCHW), out(out_BCHW);
  const float* const s = kept(s_BP, {x_BCHW.size(0), x.pixels()}, "s_BP");
  const float factor = *kept(incoming, {}, "incoming");
  each_band(x_BCHW.size(0), x.pixels(), [&](int64_t b, int64_t begin, int64_t end) {
    FASTOKD_DISPATCH(attention_scale)(x.band(b, begin, end), s + b * x.pixels() + begin, factor,
                                      out.band(b, begin, end));
  });
  return out_BCHW;
}

Tensor shifted_map(const Tensor& y_BCHW) {
  Tensor out_BCHW = at::empty_like(y_BCHW);
  const Map y(y_BCHW), out(out_BCHW);
  const int64_t P = y.pixels(), row = y.row();
  const int64_t B = y_BCHW.size(0);
  std::vector<float> energy = energies(y, B);
  each_sample(B, 2, row, [&](int64_t b, float* target) {
    float *const u = energy.data() + b * row, *const d = target + row;
    const float r = FASTOKD_DISPATCH(attention_normalise)(u, P);
    FASTOKD_DISPATCH(attention_target)(u, r, P, target);
    FASTOKD_DISPATCH(attention_difference)(target, u, P, r, d);
    std::copy(d, d + row, u);
  });
  each_band(B, P, [&](int64_t b, int64_t begin, int64_t end) {
    FASTOKD_DISPATCH(attention_shift)(y.band(b, begin, end), energy.data() + b * row + begin,
                                      1.0f / static_cast<float>(y.channels()),
                                      out.band(b, begin, end));
  });
  return out_BCHW;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastokd, CPU, m) {
  m.impl("attention_map", attention_map);
  m.impl("attention_map_backward", attention_map_backward);
  m.impl("attention_pair", attention_pair);
  m.impl("attention_pair_backward", attention_pair_backward);
  m.impl("shifted_map", shifted_map);
}

}  // namespace fastokd
