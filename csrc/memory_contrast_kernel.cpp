// Rows lie anywhere in a memory that no cache holds: those to come are prefetched.
#include "memory_contrast_kernel.h"

#include "rows.h"

namespace fastokd {
namespace {

constexpr int64_t kAhead = 8;  // rows
constexpr int64_t kLine = 64;  // bytes

template <class T>
inline const T* row(const MemoryRows& rows, int64_t k) {
  return static_cast<const T*>(rows.memory) + rows.index[k] * rows.D;
}

template <class T>
inline void prefetch(const MemoryRows& rows, int64_t k) {
  if (k >= rows.K) return;
  const char* const from = reinterpret_cast<const char*>(row<T>(rows, k));
  const int64_t bytes = rows.D * int64_t(sizeof(T));
  for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(from + at);
}

// One row and A anchors, A <= 4.
template <int A, class T>
inline void dots(const MemoryRows& rows, int64_t k, const float* x, int64_t x_step, float scale,
                 float* to, int64_t to_step) {
  Vec sums[4] = {};
  const T* const from = row<T>(rows, k);
  each_vector(rows.D, 0.0f, [&](int64_t, auto get, auto) {
    const Vec m = get(from);
    for (int a = 0; a < A; ++a) sums[a] += get(x + a * x_step) * m;
  });
  float found[4];
  sum4(found, sums[0], sums[1], sums[2], sums[3]);
  for (int a = 0; a < A; ++a) to[a * to_step + k] = found[a] * scale;
}

template <class T>
void dots_typed(const MemoryRows& rows, const float* x, int64_t x_step, float scale, float* to,
                int64_t to_step) {
  for (int64_t k = 0; k < kAhead; ++k) prefetch<T>(rows, k);
  for (int64_t k = 0; k < rows.K; ++k) {
    prefetch<T>(rows, k + kAhead);
    for (int64_t a = 0; a < rows.S; a += 4) {
      const float* const from = x + a * x_step;
      float* const at = to + a * to_step;
      switch (rows.S - a) {
        case 1: dots<1, T>(rows, k, from, x_step, scale, at, to_step); break;
        case 2: dots<2, T>(rows, k, from, x_step, scale, at, to_step); break;
        case 3: dots<3, T>(rows, k, from, x_step, scale, at, to_step); break;
        default: dots<4, T>(rows, k, from, x_step, scale, at, to_step);
      }
    }
  }
}

// R rows at once, so that the sums are read and written once for all of them.
template <int R, class T>
inline void add_rows(const MemoryRows& rows, int64_t k, const float* grad, int64_t grad_step,
                     float scale, float* sums) {
  const T* from[R];
  for (int r = 0; r < R; ++r) from[r] = row<T>(rows, k + r);
  for (int64_t a = 0; a < rows.S; ++a) {
    const float* const g = grad + a * grad_step + k;
    float* const to = sums + a * rows.D;
    each_vector(rows.D, 0.0f, [&](int64_t, auto get, auto put) {
      Vec total = get(from[0]) * (g[0] * scale);
      for (int r = 1; r < R; ++r) total += get(from[r]) * (g[r] * scale);
      put(to, get(to) + total);
    });
  }
}

template <class T>
void sums_typed(const MemoryRows& rows, const float* grad, int64_t grad_step, float scale,
                float* sums) {
  for (int64_t k = 0; k < kAhead; ++k) prefetch<T>(rows, k);
  int64_t k = 0;
  for (; k + 4 <= rows.K; k += 4) {
    for (int64_t r = 0; r < 4; ++r) prefetch<T>(rows, k + kAhead + r);
    add_rows<4, T>(rows, k, grad, grad_step, scale, sums);
  }
  for (; k < rows.K; ++k) add_rows<1, T>(rows, k, grad, grad_step, scale, sums);
}

}  // namespace

void FASTOKD_KERNEL(memory_dots)(const MemoryRows& rows, const float* x, int64_t x_step,
                                 float scale, float* to, int64_t to_step) {
  const auto typed = rows.type == Type::kFloat      ? dots_typed<float>
                     : rows.type == Type::kBFloat16 ? dots_typed<BFloat16>
                                                    : dots_typed<Half>;
  typed(rows, x, x_step, scale, to, to_step);
}

void FASTOKD_KERNEL(memory_sums)(const MemoryRows& rows, const float* grad, int64_t grad_step,
                                 float scale, float* sums) {
  const auto typed = rows.type == Type::kFloat      ? sums_typed<float>
                     : rows.type == Type::kBFloat16 ? sums_typed<BFloat16>
                                                    : sums_typed<Half>;
  typed(rows, grad, grad_step, scale, sums);
}

}  // namespace fastokd
