// Sixteen sums, more than an instruction's latency times its throughput, and two factors: 18 of the 32
// registers with AVX-512. With 16 registers (AVX2) it is twelve sums.
#include "peak_kernel.h"

#include "vec.h"

namespace fastokd {
namespace {

#if defined(__AVX512F__)
constexpr int kSums = 16;
#else
constexpr int kSums = 12;
#endif

// The compiler must neither drop a multiply-add nor move it out of its loop.
template <class Register>
inline void keep(Register& x) {
#if defined(__x86_64__)
  __asm__ volatile("" : "+v"(x));
#elif defined(__aarch64__)
  __asm__ volatile("" : "+w"(x));
#else
  __asm__ volatile("" : "+m"(x));
#endif
}

#if defined(__AVX512F__)
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))) void run_bf16(int64_t rounds) {
  __m512 sums[kSums] = {};
  __m512bh pairs = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0));
  keep(pairs);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) {
      sums[i] = _mm512_dpbf16_ps(sums[i], pairs, pairs);
      keep(sums[i]);
    }
  }
}
#endif

}  // namespace

int64_t FASTOKD_KERNEL(multiply_adds)(int64_t rounds, bool bf16) {
#if defined(__AVX512F__)
  if (bf16) {
    run_bf16(rounds);
    return 4 * 16 * kSums;
  }
#endif
  if (bf16) return 0;
  Vec sums[kSums] = {}, factor = splat(0.0f), term = splat(0.0f);
  keep(factor);
  keep(term);
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) {
      sums[i] = sums[i] * factor + term;
      keep(sums[i]);
    }
  }
  return 2 * kLanes * kSums;
}

}  // namespace fastokd
