// grad_w[o][i][j][c] = sum over images, h and w of grad_y[h][w][o] x[h s + i - p][w s + j - p][c]
//
// The product of two bfloat16 pairs (vdpbf16ps) sums over two neighbouring images. So two images are
// first laid out as one of pairs, the words (a[place][c], b[place][c]), with zeros around x. A tap of
// the kernel is then no more than an offset into x's pairs. A tile keeps M outputs by J taps by 16 V
// inputs in registers, over all the rows of a strip.
//
// A strip is as many rows, or whole images, as half of the L2 cache holds beside a block's sums: a
// tile reads three lines for a dozen cycles of products, which the L2 cache gives.
#include "conv_weight_grad_kernel.h"

#ifdef __AVX512F__
#include <immintrin.h>
#include <string.h>

// Asked for by the dispatcher's side, which looks at the CPU; the unit's own flags have no BF16.
#define FASTOKD_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace fastokd {
namespace {

FASTOKD_BF16 inline __m512i wide(const uint16_t* x) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

// `places` of two images, `step` elements apart, as pairs: 16 V channels together, such groups
// `group` words apart. Without a second image its values are 0.
template <int V>
FASTOKD_BF16 void pair_places(const uint16_t* a, const uint16_t* b, int64_t step, int64_t places,
                              int64_t channels, int64_t group, uint32_t* to) {
  for (int64_t n = 0; n < places; ++n, a += step, to += 16 * V) {
    for (int64_t c = 0; c < channels; c += 16 * V) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        __m512i pair = wide(a + c + 16 * v);
        if (b) pair = _mm512_or_si512(pair, _mm512_slli_epi32(wide(b + c + 16 * v), 16));
        _mm512_storeu_si512(to + c / (16 * V) * group + 16 * v, pair);
      }
    }
    if (b) b += step;
  }
}

// Pairs of a strip: of rows of `places`, where a written row takes the read rows from `advance` times
// its own on.
struct Strip {
  int64_t pairs, rows, x_rows, places, x_places, advance;
};

template <int M, int J, int V>
FASTOKD_BF16 void tile(const Strip& s, const uint32_t* x, const uint32_t* y, float* w) {
  __m512 sums[M][J][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[m][j][v] = _mm512_loadu_ps(w + ((m * J + j) * V + v) * 16);
  for (int64_t b = 0; b < s.pairs; ++b) {
    for (int64_t r = 0; r < s.rows; ++r) {
      const uint32_t* xp = x + (b * s.x_rows + r * s.advance) * s.x_places * 16 * V;
      const uint32_t* yp = y + (b * s.rows + r) * s.places * 16;
      for (int64_t p = 0; p < s.places; ++p, xp += s.advance * 16 * V, yp += 16) {
        __m512bh taps[J][V];
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v)
            taps[j][v] =
                reinterpret_cast<__m512bh>(_mm512_loadu_si512(xp + (j * V + v) * 16));
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          const __m512bh out =
              reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(yp[m])));
#pragma GCC unroll 4
          for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v)
              sums[m][j][v] = _mm512_dpbf16_ps(sums[m][j][v], out, taps[j][v]);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) _mm512_storeu_ps(w + ((m * J + j) * V + v) * 16, sums[m][j][v]);
}

// Calls body(first output, row of the kernel, first input, the tile's sums) for every tile.
template <int M, int J, int V, class Body>
inline void each_tile(const ConvBlock& block, float* sums, Body body) {
  for (int64_t i = 0; i < J; ++i)
    for (int64_t c = 0; c < block.inputs; c += 16 * V)
      for (int64_t o = 0; o < block.outputs; o += M, sums += M * J * V * 16) body(o, i, c, sums);
}

// Where a strip of x and of grad_y lies in scratch memory: channels in groups.
struct Pairs {
  uint32_t *x, *y;
  int64_t x_group, y_group;
};

template <int V>
FASTOKD_BF16 void lay_out(const ConvShape& s, const ConvBlock& block, const Strip& strip,
                          int64_t top, const uint16_t* x, const uint16_t* grad_y, int64_t images,
                          const Pairs& to) {
  // A 1x1 kernel reads no place between those that its stride leaves.
  const int64_t step = s.K == 1 ? s.stride : 1;
  // The places of a row that lie within the map.
  const int64_t first = s.padding < strip.x_places * step ? (s.padding + step - 1) / step
                                                          : strip.x_places;
  const int64_t reach = s.W + s.padding > 0 ? (s.W + s.padding - 1) / step + 1 : 0;
  const int64_t last = reach < strip.x_places ? reach : strip.x_places;
  const int64_t width = 16 * V, groups = block.inputs / width;
  for (int64_t b = 0; b < strip.pairs; ++b) {
    const bool both = 2 * b + 1 < images;
    const uint16_t* const image = x + 2 * b * s.H * s.W * s.C + block.c;
    for (int64_t r = 0; r < strip.x_rows; ++r) {
      const int64_t h = (top * strip.advance + r) * step - s.padding;
      uint32_t* const row = to.x + (b * strip.x_rows + r) * strip.x_places * width;
      const bool inside = h >= 0 && h < s.H && first < last;
      const int64_t begin = inside ? first : strip.x_places, end = inside ? last : begin;
      for (int64_t g = 0; g < groups; ++g) {
        memset(row + g * to.x_group, 0, static_cast<size_t>(begin * width) * 4);
        memset(row + g * to.x_group + end * width, 0,
               static_cast<size_t>((strip.x_places - end) * width) * 4);
      }
      if (!inside) continue;
      const uint16_t* const a = image + (h * s.W + first * step - s.padding) * s.C;
      pair_places<V>(a, both ? a + s.H * s.W * s.C : nullptr, step * s.C, last - first,
                     block.inputs, to.x_group, row + first * width);
    }
    for (int64_t r = 0; r < strip.rows; ++r) {
      const uint16_t* const a =
          grad_y + ((2 * b * s.OH + top + r) * s.OW) * s.O + block.o;
      pair_places<1>(a, both ? a + s.OH * s.OW * s.O : nullptr, s.O, s.OW, block.outputs,
                     to.y_group, to.y + (b * strip.rows + r) * strip.places * 16);
    }
  }
}

constexpr int64_t kStripBytes = 256 * 1024;

// The strips that a map is taken in: whole images where they fit, else rows of two.
Strip strip_of(const ConvShape& s, int64_t images) {
  Strip strip;
  strip.advance = s.K == 1 ? 1 : s.stride;
  strip.places = s.OW;
  strip.x_places = (s.OW - 1) * strip.advance + s.K;
  const int64_t inputs = s.C < kConvBlock ? s.C : kConvBlock;
  const int64_t outputs = s.O < kConvBlock ? s.O : kConvBlock;
  const auto bytes = [&](int64_t rows) {
    return 4 * (((rows - 1) * strip.advance + s.K) * strip.x_places * inputs +
                rows * strip.places * outputs);
  };
  strip.rows = 1;
  while (strip.rows < s.OH && bytes(strip.rows + 1) <= kStripBytes) ++strip.rows;
  // Of about equal length.
  const int64_t count = (s.OH + strip.rows - 1) / strip.rows;
  strip.rows = (s.OH + count - 1) / count;
  strip.x_rows = (strip.rows - 1) * strip.advance + s.K;
  strip.pairs = 1;
  const int64_t most = (images + 1) / 2;
  if (count == 1) {
    while (strip.pairs < most && (strip.pairs + 1) * bytes(s.OH) <= kStripBytes) ++strip.pairs;
  }
  return strip;
}

template <int M, int J, int V>
FASTOKD_BF16 void block_sums(const ConvShape& s, const ConvBlock& block, const uint16_t* x,
                             const uint16_t* grad_y, int64_t images, int64_t begin, int64_t end,
                             uint32_t* scratch, float* grad_w) {
  const Strip whole = strip_of(s, images);
  const int64_t size = block.outputs * J * J * block.inputs;
  float* const sums = reinterpret_cast<float*>(scratch);
  memset(sums, 0, static_cast<size_t>(size) * sizeof(float));
  Pairs at;
  at.x_group = whole.pairs * whole.x_rows * whole.x_places * 16 * V;
  at.y_group = whole.pairs * whole.rows * whole.places * 16;
  at.x = scratch + size;
  at.y = at.x + at.x_group * (block.inputs / (16 * V));
  for (int64_t b = 0; b < images; b += 2 * whole.pairs) {
    Strip strip = whole;
    const int64_t left = (images - b + 1) / 2;
    if (left < strip.pairs) strip.pairs = left;
    for (int64_t top = begin; top < end; top += whole.rows) {
      strip.rows = whole.rows < end - top ? whole.rows : end - top;
      strip.x_rows = (strip.rows - 1) * strip.advance + s.K;
      lay_out<V>(s, block, strip, top, x + b * s.H * s.W * s.C, grad_y + b * s.OH * s.OW * s.O,
                 images - b, at);
      each_tile<M, J, V>(block, sums, [&](int64_t o, int64_t i, int64_t c, float* w) {
        tile<M, J, V>(strip, at.x + c / (16 * V) * at.x_group + i * strip.x_places * 16 * V,
                      at.y + o / 16 * at.y_group + o % 16, w);
      });
    }
  }
  each_tile<M, J, V>(block, sums, [&](int64_t o, int64_t i, int64_t c, const float* w) {
    for (int m = 0; m < M; ++m)
      for (int j = 0; j < J; ++j, w += 16 * V)
        memcpy(grad_w + (((block.o + o + m) * J + i) * J + j) * s.C + block.c + c, w,
               16 * V * sizeof(float));
  });
}

}  // namespace

int64_t conv_weight_grad_scratch(const ConvShape& s, int64_t images) {
  const Strip strip = strip_of(s, images);
  const int64_t inputs = s.C < kConvBlock ? s.C : kConvBlock;
  const int64_t outputs = s.O < kConvBlock ? s.O : kConvBlock;
  return outputs * s.K * s.K * inputs +
         strip.pairs * (strip.x_rows * strip.x_places * inputs + strip.rows * strip.places * outputs);
}

FASTOKD_BF16 void conv_weight_grad_avx512(const ConvShape& s, const ConvBlock& block,
                                          const uint16_t* x, const uint16_t* grad_y,
                                          int64_t images, int64_t top, int64_t bottom,
                                          uint32_t* scratch, float* grad_w) {
  const auto sums = s.K == 3 ? (block.inputs % 32 == 0 ? block_sums<4, 3, 2> : block_sums<8, 3, 1>)
                             : (block.inputs % 32 == 0 ? block_sums<8, 1, 2> : block_sums<16, 1, 1>);
  sums(s, block, x, grad_y, images, top, bottom, scratch, grad_w);
}

}  // namespace fastokd
#endif
