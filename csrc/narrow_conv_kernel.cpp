// y[n][o] = sum over taps i, j and inputs c of x[row i][place p][c] weight[i][j][c][o]
//
// The product of two bfloat16 pairs (vdpbf16ps) sums over two neighbouring inputs, as they stand in
// memory; 16 outputs fill a register. N places by 16 M outputs stay in registers. A pair of inputs is
// read once, for all lanes alike, and used by each of the (up to three) places that it reaches: with
// 16 outputs there would otherwise be a read for every product, and reads would set the pace.
#include "narrow_conv_kernel.h"

#ifdef __AVX512F__
#include <immintrin.h>
#include <string.h>

// Asked for by the dispatcher's side, which looks at the CPU; the unit's own flags have no BF16.
#define FASTOKD_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace fastokd {
namespace {

// A row that is read, and the weights of its taps.
struct Row {
  const uint16_t* x;
  const uint32_t* weight;
};

// How many places of a row N written ones read, and which of them place p reaches by tap j.
template <Places places, int N>
struct Reach {
  static constexpr int kCount = places == Places::kSame   ? N + 2
                                : places == Places::kHalf ? 2 * N + 1
                                                          : N / 2 + 1;
  static constexpr int of(int p, int j) {
    const int n = places == Places::kSame   ? p - j
                  : places == Places::kHalf ? ((p - j) % 2 ? -1 : (p - j) / 2)
                                            : 2 * p + j - 1;
    return n >= 0 && n < N ? n : -1;
  }
};

// Strides in words: from tap to tap, from 16 outputs to the next.
struct Strides {
  int64_t tap, block;
};

template <Places places, int M, int N>
FASTOKD_BF16 void tile(const Row* rows, int count, int64_t inputs, Strides strides, uint16_t* y,
                       int64_t outputs) {
  using Reached = Reach<places, N>;
  __m512 sums[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) sums[m][n] = _mm512_setzero_ps();
  // Its lines come while the sums are made.
  for (int64_t n = 0; n < N * outputs; n += outputs < 32 ? 32 : outputs) __builtin_prefetch(y + n, 1);
  for (int r = 0; r < count; ++r) {
    const uint16_t* x = rows[r].x;
    const uint32_t* w = rows[r].weight;
    for (int64_t c = 0; c < inputs; c += 2, x += 2, w += 16) {
      __m512bh taps[3][M];
#pragma GCC unroll 4
      for (int j = 0; j < 3; ++j)
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m)
          taps[j][m] = reinterpret_cast<__m512bh>(
              _mm512_loadu_si512(w + j * strides.tap + m * strides.block));
#pragma GCC unroll 40
      for (int p = 0; p < Reached::kCount; ++p) {
        int32_t pair;
        memcpy(&pair, x + p * inputs, sizeof(pair));
        const __m512bh wide = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
        for (int j = 0; j < 3; ++j)
          if (Reached::of(p, j) >= 0)
#pragma GCC unroll 16
            for (int m = 0; m < M; ++m) {
              __m512& sum = sums[m][Reached::of(p, j)];
              sum = _mm512_dpbf16_ps(sum, taps[j][m], wide);
            }
      }
    }
  }
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + n * outputs + 16 * m),
                          reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sums[m][n])));
}

// The last rows that were read, each with a place of zeros at either end.
struct Ring {
  static constexpr int64_t kRows = 4;
  const uint16_t* x;
  int64_t W, inputs, loaded;
  uint16_t* rows;

  uint16_t* at(int64_t h) const { return rows + h % kRows * (W + 2) * inputs; }

  const uint16_t* row(int64_t h) {
    for (; loaded <= h; ++loaded) {
      const uint16_t* const from = x + loaded * W * inputs;
      memcpy(at(loaded) + inputs, from, static_cast<size_t>(W * inputs) * sizeof(uint16_t));
      // The next row comes while this one is computed with.
      for (int64_t n = 0; n < W * inputs; n += 32) __builtin_prefetch(from + W * inputs + n);
    }
    return at(h);
  }
};

// The first row that output row h reads, which may be the one above the map.
template <Places places>
inline int64_t first_read(int64_t h) {
  return places == Places::kSame ? h - 1 : places == Places::kHalf ? 2 * h - 1 : h / 2;
}

// Rows [begin, end) of one image's output.
template <Places places, int M, int N>
FASTOKD_BF16 void image(const NarrowShape& s, Ring& ring, const uint32_t* packed, int64_t begin,
                        int64_t end, uint16_t* y) {
  const int64_t block = s.inputs / 2 * 16;
  const Strides strides = {s.outputs / 16 * block, block};
  for (int64_t h = begin; h < end; ++h) {
    Row rows[3];
    int count = 0;
    for (int64_t i = 0; i < 3; ++i) {
      if (places == Places::kTwice && (h + 1 - i) % 2) continue;
      const int64_t from = places == Places::kSame   ? h + i - 1
                           : places == Places::kHalf ? 2 * h + i - 1
                                                     : (h + 1 - i) / 2;
      if (from < 0 || from >= s.H) continue;
      rows[count++] = {ring.row(from), packed + 3 * i * strides.tap};
    }
    for (int64_t w = 0; w < s.OW; w += N) {
      const int64_t first = places == Places::kSame   ? w
                            : places == Places::kHalf ? 2 * w
                                                      : w / 2 + 1;
      for (int64_t o = 0; o < s.outputs; o += 16 * M) {
        Row here[3];
        for (int r = 0; r < count; ++r)
          here[r] = {rows[r].x + first * s.inputs, rows[r].weight + o / 16 * block};
        tile<places, M, N>(here, count, s.inputs, strides, y + (h * s.OW + w) * s.outputs + o,
                           s.outputs);
      }
    }
  }
}

template <Places places>
FASTOKD_BF16 void images_of(const NarrowShape& s, const uint16_t* x, const uint32_t* packed,
                            int64_t begin, int64_t end, uint16_t* rows, uint16_t* y) {
  while (begin < end) {
    const int64_t b = begin / s.OH, top = begin % s.OH;
    const int64_t bottom = end - b * s.OH < s.OH ? end - b * s.OH : s.OH;
    const int64_t first = first_read<places>(top);
    Ring ring = {x + b * s.H * s.W * s.inputs, s.W, s.inputs, first < 0 ? 0 : first, rows};
    uint16_t* const to = y + b * s.OH * s.OW * s.outputs;
    if (s.outputs % 32 == 0) {
      image<places, 2, 8>(s, ring, packed, top, bottom, to);
    } else if (s.OW % 16 == 0) {
      image<places, 1, 16>(s, ring, packed, top, bottom, to);
    } else {
      image<places, 1, 8>(s, ring, packed, top, bottom, to);
    }
    begin += bottom - top;
  }
}

FASTOKD_BF16 inline __m512i wide(const uint16_t* x) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}

}  // namespace

FASTOKD_BF16 void narrow_conv_pack_avx512(const NarrowShape& s, bool gradient,
                                          const uint16_t* weight, uint32_t* packed) {
  const int64_t C = gradient ? s.outputs : s.inputs;
  // The gradient of stride 1 is a convolution with the taps in reverse.
  const bool reverse = gradient && s.places == Places::kSame;
  const __m512i lanes = _mm512_mullo_epi32(
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
      _mm512_set1_epi32(static_cast<int>(9 * C / 2)));
  for (int64_t tap = 0; tap < 9; ++tap) {
    const uint16_t* const from = weight + (reverse ? 8 - tap : tap) * C;
    for (int64_t o = 0; o < s.outputs; o += 16) {
      for (int64_t c = 0; c < s.inputs; c += 2, packed += 16) {
        __m512i pairs;
        if (gradient) {  // inputs are the weight's rows
          const uint16_t* const row = from + c * 9 * C + o;
          pairs = _mm512_or_si512(wide(row), _mm512_slli_epi32(wide(row + 9 * C), 16));
        } else {
          pairs = _mm512_i32gather_epi32(lanes, from + o * 9 * C + c, 4);
        }
        _mm512_storeu_si512(packed, pairs);
      }
    }
  }
}

FASTOKD_BF16 void narrow_conv_avx512(const NarrowShape& s, const uint16_t* x,
                                     const uint32_t* packed, int64_t begin, int64_t end,
                                     uint32_t* scratch, uint16_t* y) {
  // The places at the rows' ends stay 0.
  memset(scratch, 0, static_cast<size_t>(narrow_conv_scratch(s)) * sizeof(uint32_t));
  uint16_t* const rows = reinterpret_cast<uint16_t*>(scratch);
  switch (s.places) {
    case Places::kSame: return images_of<Places::kSame>(s, x, packed, begin, end, rows, y);
    case Places::kHalf: return images_of<Places::kHalf>(s, x, packed, begin, end, rows, y);
    default: return images_of<Places::kTwice>(s, x, packed, begin, end, rows, y);
  }
}

}  // namespace fastokd
#endif
