// grad_w[o][i][j][c] = sum over images, h and w of grad_y[h][w][o] x[h s + i - p][w s + j - p][c]
//
// The product of two bfloat16 pairs (vdpbf16ps) sums over two neighbouring outputs w, w + 1. So
// rows are first laid out in pairs: for every place q of x the words (x[q][c], x[q + s][c]), for
// every second w of grad_y the words (grad_y[w][o], grad_y[w + 1][o]). A tap of the kernel is then
// no more than an offset into x's pairs. A tile keeps M outputs o by J taps j by 16 V inputs c in
// registers, over all the rows of a strip.
#include "conv_weight_grad_kernel.h"

#ifdef __AVX512F__
#include <immintrin.h>
#include <string.h>

// Asked for by the dispatcher's side, which looks at the CPU; the unit's own flags have no BF16.
#define FASTOKD_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace fastokd {
namespace {

// Pairs of 16 channels; a null pointer is a place outside, 0.
FASTOKD_BF16 inline __m512i pairs_of(const uint16_t* a, const uint16_t* b) {
  __m512i low = _mm512_setzero_si512(), high = low;
  if (a) low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
  if (b) high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// One row of `width` places as `count` pairs, `step` places apart, from place `first` on; a pair's
// second place is `gap` after its first.
FASTOKD_BF16 void pair_row(const uint16_t* row, int64_t width, int64_t channels, int64_t first,
                           int64_t step, int64_t gap, int64_t count, uint32_t* to) {
  for (int64_t n = 0; n < count; ++n, to += channels) {
    const int64_t p = first + n * step, q = p + gap;
    const uint16_t* const a = p >= 0 && p < width ? row + p * channels : nullptr;
    const uint16_t* const b = q >= 0 && q < width ? row + q * channels : nullptr;
    for (int64_t c = 0; c < channels; c += 16) {
      _mm512_storeu_si512(to + c, pairs_of(a ? a + c : nullptr, b ? b + c : nullptr));
    }
  }
}

// Strides in words: from row to row, from pair to pair, from tap to tap.
struct Walk {
  int64_t x_row, x_pair, x_tap, y_row, y_pair, w_output, w_tap;
};

template <int M, int J, int V>
FASTOKD_BF16 void tile(const Walk& s, const uint32_t* x, const uint32_t* y, int64_t rows,
                       int64_t pairs, float* w) {
  __m512 sums[M][J][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        sums[m][j][v] = _mm512_loadu_ps(w + m * s.w_output + j * s.w_tap + 16 * v);
  for (int64_t r = 0; r < rows; ++r) {
    const uint32_t* xp = x + r * s.x_row;
    const uint32_t* yp = y + r * s.y_row;
    for (int64_t p = 0; p < pairs; ++p, xp += s.x_pair, yp += s.y_pair) {
      __m512i taps[J][V];
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) taps[j][v] = _mm512_loadu_si512(xp + j * s.x_tap + 16 * v);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const __m512bh out = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(yp[m])));
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v)
            sums[m][j][v] =
                _mm512_dpbf16_ps(sums[m][j][v], out, reinterpret_cast<__m512bh>(taps[j][v]));
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        _mm512_storeu_ps(w + m * s.w_output + j * s.w_tap + 16 * v, sums[m][j][v]);
}

template <int M, int J, int V>
FASTOKD_BF16 void strip_sums(const ConvShape& s, const uint32_t* x, const uint32_t* y,
                             int64_t rows, float* w) {
  const int64_t padded = s.W + 2 * s.padding, pairs = (s.OW + 1) / 2;
  const Walk walk = {s.stride * padded * s.C, 2 * s.stride * s.C, s.C,
                     pairs * s.O,             s.O,                s.K * s.K * s.C, s.C};
  for (int64_t i = 0; i < s.K; ++i)
    for (int64_t j = 0; j < s.K; j += J)
      for (int64_t c = 0; c < s.C; c += 16 * V)
        for (int64_t o = 0; o < s.O; o += M)
          tile<M, J, V>(walk, x + (i * padded + j) * s.C + c, y + o, rows, pairs,
                        w + ((o * s.K + i) * s.K + j) * s.C + c);
}

}  // namespace

FASTOKD_BF16 void conv_weight_grad_avx512(const ConvShape& s, const uint16_t* x,
                                          const uint16_t* grad_y, int64_t images, int64_t strip,
                                          uint32_t* scratch, float* grad_w) {
  const int64_t padded = s.W + 2 * s.padding, pairs = (s.OW + 1) / 2;
  uint32_t* const x_pairs = scratch;
  uint32_t* const y_pairs = scratch + ((strip - 1) * s.stride + s.K) * padded * s.C;
  for (int64_t b = 0; b < images; ++b, x += s.H * s.W * s.C, grad_y += s.OH * s.OW * s.O) {
    for (int64_t top = 0; top < s.OH; top += strip) {
      const int64_t rows = strip < s.OH - top ? strip : s.OH - top;
      for (int64_t r = 0; r < (rows - 1) * s.stride + s.K; ++r) {
        const int64_t h = top * s.stride + r - s.padding;
        uint32_t* const to = x_pairs + r * padded * s.C;
        if (h < 0 || h >= s.H) {
          memset(to, 0, static_cast<size_t>(padded * s.C) * sizeof(uint32_t));
        } else {
          pair_row(x + h * s.W * s.C, s.W, s.C, -s.padding, 1, s.stride, padded, to);
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        pair_row(grad_y + (top + r) * s.OW * s.O, s.OW, s.O, 0, 2, 1, pairs,
                 y_pairs + r * pairs * s.O);
      }
      if (s.K == 3 && s.C % 32 == 0) {
        strip_sums<4, 3, 2>(s, x_pairs, y_pairs, rows, grad_w);
      } else if (s.K == 3) {
        strip_sums<8, 3, 1>(s, x_pairs, y_pairs, rows, grad_w);
      } else if (s.C % 64 == 0) {
        strip_sums<4, 1, 4>(s, x_pairs, y_pairs, rows, grad_w);
      } else if (s.C % 32 == 0) {
        strip_sums<8, 1, 2>(s, x_pairs, y_pairs, rows, grad_w);
      } else {
        strip_sums<16, 1, 1>(s, x_pairs, y_pairs, rows, grad_w);
      }
    }
  }
}

}  // namespace fastokd
#endif
