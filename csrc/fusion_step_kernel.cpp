// Memory is read and written in its own order, all channels of a pixel and then the next pixel's.
// Between, each cell is an image of floats with a border of zeros, so that the nine taps need no
// tests and no conversions, and their weights stay in registers.
#include "fusion_step_kernel.h"

#include "vec.h"

namespace fastokd {
namespace {

constexpr int kVecs = kCell / kLanes;  // vectors of a pixel of a cell

// Channels `at` and on of a row that has `left` of them from there.
template <class T>
inline Vec load_some(const T* p, int64_t left) {
  if (left >= kLanes) return load(p);
  return left > 0 ? load_part(p, static_cast<int>(left), 0.0f) : Vec{};
}
template <class T>
inline void store_some(T* p, int64_t left, Vec x) {
  if (left >= kLanes) {
    store(p, x);
  } else if (left > 0) {
    store_part(p, x, static_cast<int>(left));
  }
}

// An image of floats for each cell of each map.
struct Images {
  float* data;
  int64_t maps, cells;  // cells of a map
  int64_t height, width, channels;
  int64_t row, size;  // floats of an image's row and of an image
  Images(float* scratch, const FusionShape& s)
      : data(scratch),
        maps(s.maps),
        cells(fusion_cells(s) / s.maps),
        height(s.height),
        width(s.width),
        channels(s.channels),
        row((s.width + 2) * kCell),
        size((s.height + 2) * row) {}
  float* next() const { return data + maps * cells * size; }
  void clear_borders() const {
    for (float* p = data; p < next(); p += size) {
      for (int64_t i = 0; i < row; ++i) p[i] = p[size - row + i] = 0.0f;
      for (int64_t h = 1; h <= height; ++h) {
        for (int64_t i = 0; i < kCell; ++i) p[h * row + i] = p[(h + 1) * row - kCell + i] = 0.0f;
      }
    }
  }

  // Calls body(pixel's number, its offset from an image's first pixel).
  template <class Body>
  inline void pixels(Body body) const {
    int64_t n = 0;
    for (int64_t h = 0; h < height; ++h) {
      for (int64_t w = 0; w < width; ++w) body(n++, h * row + w * kCell);
    }
  }
  // For every vector of channels of map m: body(where it is in `data` at its cell's first pixel,
  // its place among numbers that come cell by cell, its first channel in the map, channels left).
  template <class Body>
  inline void vectors(int64_t m, Body body) const {
    for (int64_t j = 0; j < cells; ++j) {
      const int64_t i = m * cells + j, c = j * kCell;
      for (int v = 0; v < kVecs; ++v) {
        const int64_t lane = v * kLanes;
        body(i * size + row + kCell + lane, i * kCell + lane, c + lane, channels - c - lane);
      }
    }
  }
};

template <class T>
void fill(const Images x, const FusionShape& s, const void* const* maps) {
  x.clear_borders();
  for (int64_t m = 0; m < x.maps; ++m) {
    const T* from = static_cast<const T*>(maps[m]);
    x.pixels([&, stride = s.stride_x](int64_t, int64_t at) {
      x.vectors(m, [&](int64_t first, int64_t, int64_t c, int64_t left) {
        store(x.data + first + at, load_some(from + c, left));
      });
      from += stride;
    });
  }
}

// Tap o of numbers at `place` among those that come cell by cell, one number a tap.
inline int64_t tap(int64_t place, int o) {
  return (place / kCell * 9 + o) * kCell + place % kCell;
}

// to = the taps' sums over x; tap o is weighted by taps[o], or by taps[8 - o] where `flip`.
void convolve(const Images x, const Images to, const float* taps, bool flip) {
  for (int64_t m = 0; m < x.maps; ++m) {
    x.vectors(m, [&](int64_t first, int64_t place, int64_t, int64_t) {
      Vec w[9];
#pragma GCC unroll 9
      for (int o = 0; o < 9; ++o) w[o] = load(taps + tap(place, flip ? 8 - o : o));
      const float* const image = x.data + first;
      float* const out = to.data + first;
      x.pixels([&](int64_t, int64_t at) {
        Vec total{};
#pragma GCC unroll 3
        for (int r = 0; r < 3; ++r) {
          const float* const left = image + at + (r - 1) * x.row - kCell;
          total += load(left) * w[3 * r];
          total += load(left + kCell) * w[3 * r + 1];
          total += load(left + 2 * kCell) * w[3 * r + 2];
        }
        store(out + at, total);
      });
    });
  }
}

// Writes the images as pixels of all channels, and leaves in them what was written.
template <class T>
void write(const Images from, void* to_any) {
  T* to = static_cast<T*>(to_any);
  from.pixels([&](int64_t, int64_t at) {
    for (int64_t m = 0; m < from.maps; ++m, to += from.channels) {
      from.vectors(m, [&](int64_t first, int64_t, int64_t c, int64_t left) {
        float* const value = from.data + first + at;
        store_some(to + c, left, load(value));
        if (sizeof(T) != sizeof(float)) store(value, load_some(to + c, left));
      });
    }
  });
}

template <class T>
void conv(const FusionShape& s, const void* const* maps, const float* taps, float* scratch,
          void* z_any, float* mean, float* m2) {
  const Images x(scratch, s), z(x.next(), s);
  fill<T>(x, s, maps);
  convolve(x, z, taps, false);
  write<T>(z, z_any);
  const Vec count = splat(static_cast<float>(s.height * s.width));
  for (int64_t m = 0; m < s.maps; ++m) {
    z.vectors(m, [&](int64_t first, int64_t place, int64_t, int64_t) {
      const float* const image = z.data + first;
      Vec total{}, squares{};
      z.pixels([&](int64_t, int64_t at) { total += load(image + at); });
      const Vec middle = total / count;
      z.pixels([&](int64_t, int64_t at) {
        const Vec d = load(image + at) - middle;
        squares += d * d;
      });
      store(mean + place, middle);
      store(m2 + place, squares);
    });
  }
}

template <class T>
void normalise(const FusionShape& s, const void* z_any, void* y_any, const float* mean,
               const float* scale, const float* beta) {
  const int64_t K = s.maps * s.channels, pixels = s.height * s.width;
  const T* z = static_cast<const T*>(z_any);
  T* y = static_cast<T*>(y_any);
  for (int64_t n = 0; n < pixels; ++n, z += K, y += K) {
    for (int64_t k = 0; k < K; k += kLanes) {
      const int64_t left = K - k;
      const Vec d = load_some(z + k, left) - load_some(mean + k, left);
      const Vec value = d * load_some(scale + k, left) + load_some(beta + k, left);
      store_some(y + k, left, select(value < Vec{}, Vec{}, value));  // a NaN goes through
    }
  }
}

// Calls body(where the vector is in the images' data, its place, g, xhat) in memory's order.
template <class T, class Body>
inline void hidden(const Images images, const void* z_any, const void* grad_any,
                   const FusionNorm norm, Body body) {
  const T* z = static_cast<const T*>(z_any);
  const T* dy = static_cast<const T*>(grad_any);
  images.pixels([&](int64_t, int64_t at) {
    for (int64_t m = 0; m < images.maps; ++m, z += images.channels, dy += images.channels) {
      images.vectors(m, [&](int64_t first, int64_t place, int64_t c, int64_t left) {
        const Vec d = load_some(z + c, left) - load(norm.mean + place);
        const Vec xhat = d * load(norm.rstd + place);
        const Vec y = xhat * load(norm.gamma + place) + load(norm.beta + place);
        body(first + at, place, select(y <= Vec{}, Vec{}, load_some(dy + c, left)), xhat);
      });
    }
  });
}

template <class T>
void reduce(const FusionShape& s, const void* z, const void* grad_y, const FusionNorm& norm,
            float* sum_g, float* sum_gx) {
  const int64_t count = fusion_cells(s) * kCell;
  for (int64_t i = 0; i < count; ++i) sum_g[i] = sum_gx[i] = 0.0f;
  hidden<T>(Images(nullptr, s), z, grad_y, norm, [=](int64_t, int64_t place, Vec g, Vec xhat) {
    store(sum_g + place, load(sum_g + place) + g);
    store(sum_gx + place, load(sum_gx + place) + g * xhat);
  });
}

template <class T>
void gradient(const FusionShape& s, const void* const* maps, const float* taps, const void* z,
              const void* grad_y, const FusionNorm& of, float* scratch, float* grad_taps,
              void* grad_maps) {
  const Images x(scratch, s), dz(x.next(), s);
  fill<T>(x, s, maps);
  dz.clear_borders();
  hidden<T>(dz, z, grad_y, of, [dz, norm = of](int64_t at, int64_t place, Vec g, Vec xhat) {
    const Vec mean_g = load(norm.mean_g + place), mean_gx = load(norm.mean_gx + place);
    const Vec scale = load(norm.gamma + place) * load(norm.rstd + place);
    store(dz.data + at, (g - mean_g - xhat * mean_gx) * scale);
  });
  for (int64_t m = 0; m < s.maps; ++m) {
    x.vectors(m, [&](int64_t first, int64_t place, int64_t, int64_t) {
      Vec total[9] = {};
      const float *const image = x.data + first, *const by = dz.data + first;
      x.pixels([&](int64_t, int64_t at) {
        const Vec d = load(by + at);
#pragma GCC unroll 3
        for (int r = 0; r < 3; ++r) {
          const float* const left = image + at + (r - 1) * x.row - kCell;
          total[3 * r] += d * load(left);
          total[3 * r + 1] += d * load(left + kCell);
          total[3 * r + 2] += d * load(left + 2 * kCell);
        }
      });
#pragma GCC unroll 9
      for (int o = 0; o < 9; ++o) store(grad_taps + tap(place, o), total[o]);
    });
  }
  if (grad_maps) {
    convolve(dz, x, taps, true);
    write<T>(x, grad_maps);
  }
}

}  // namespace

// Runs a template for the maps' type.
#define FASTOKD_TYPED(type, function, ...)                                \
  switch (type) {                                                         \
    case Type::kFloat: return function<float>(__VA_ARGS__);               \
    case Type::kBFloat16: return function<BFloat16>(__VA_ARGS__);         \
    case Type::kHalf: return function<Half>(__VA_ARGS__);                 \
  }

void FASTOKD_KERNEL(fusion_conv)(const FusionShape& shape, const void* const* maps,
                                 const float* taps, float* scratch, void* z, float* mean,
                                 float* m2) {
  FASTOKD_TYPED(shape.type, conv, shape, maps, taps, scratch, z, mean, m2)
}

void FASTOKD_KERNEL(fusion_normalise)(const FusionShape& shape, const void* z, void* y,
                                      const float* mean, const float* scale, const float* beta) {
  FASTOKD_TYPED(shape.type, normalise, shape, z, y, mean, scale, beta)
}

void FASTOKD_KERNEL(fusion_reduce)(const FusionShape& shape, const void* z, const void* grad_y,
                                   const FusionNorm& norm, float* sum_g, float* sum_gx) {
  FASTOKD_TYPED(shape.type, reduce, shape, z, grad_y, norm, sum_g, sum_gx)
}

void FASTOKD_KERNEL(fusion_gradient)(const FusionShape& shape, const void* const* maps,
                                     const float* taps, const void* z, const void* grad_y,
                                     const FusionNorm& norm, float* scratch, float* grad_taps,
                                     void* grad_maps) {
  FASTOKD_TYPED(shape.type, gradient, shape, maps, taps, z, grad_y, norm, scratch, grad_taps,
                grad_maps)
}

}  // namespace fastokd
