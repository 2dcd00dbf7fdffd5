// Rows lie anywhere in a memory that no cache holds: several are read at once, so that their misses overlap.
#include "memory_contrast_kernel.h"

#include "rows.h"

namespace fastokd {
namespace {

constexpr int kRows = 8;  // at once

template <int R>
struct Count {
  static constexpr int value = R;
};

template <class T>
inline const T* row(const MemoryRows& rows, int64_t k) {
  return static_cast<const T*>(rows.memory) + rows.index[k] * rows.D;
}

// R rows and one anchor.
template <int R, class T>
inline void dots(const T* const* from, const float* x, int64_t D, float scale, float* to) {
  Vec sums[(R + 3) / 4 * 4] = {};
  each_vector(D, 0.0f, [&](int64_t, auto get, auto) {
    const Vec anchor = get(x);
    for (int r = 0; r < R; ++r) sums[r] += get(from[r]) * anchor;
  });
  float found[(R + 3) / 4 * 4];
  for (int r = 0; r < R; r += 4) sum4(found + r, sums[r], sums[r + 1], sums[r + 2], sums[r + 3]);
  for (int r = 0; r < R; ++r) to[r] = found[r] * scale;
}

// sums += scale times the R rows by their gradients, of one anchor.
template <int R, class T>
inline void add(const T* const* from, const float* grad, int64_t D, float scale, float* sums) {
  each_vector(D, 0.0f, [&](int64_t, auto get, auto put) {
    Vec total{};
    for (int r = 0; r < R; ++r) total += get(from[r]) * grad[r];
    put(sums, get(sums) + total * scale);
  });
}

// Calls body(k, rows k and following, their count) for kRows rows at a time, then for single ones.
template <class T, class Body>
inline void each_row(const MemoryRows& rows, Body body) {
  const T* from[kRows];
  int64_t k = 0;
  for (; k + kRows <= rows.K; k += kRows) {
    for (int r = 0; r < kRows; ++r) from[r] = row<T>(rows, k + r);
    body(k, from, Count<kRows>{});
  }
  for (; k < rows.K; ++k) {
    from[0] = row<T>(rows, k);
    body(k, from, Count<1>{});
  }
}

template <class T>
void dots_typed(const MemoryRows& rows, const float* x, int64_t x_step, float scale, float* to,
                int64_t to_step) {
  each_row<T>(rows, [&](int64_t k, const T* const* from, auto count) {
    for (int64_t a = 0; a < rows.S; ++a) {
      dots<decltype(count)::value>(from, x + a * x_step, rows.D, scale, to + a * to_step + k);
    }
  });
}

template <class T>
void sums_typed(const MemoryRows& rows, const float* grad, int64_t grad_step, float scale,
                float* sums) {
  each_row<T>(rows, [&](int64_t k, const T* const* from, auto count) {
    for (int64_t a = 0; a < rows.S; ++a) {
      add<decltype(count)::value>(from, grad + a * grad_step + k, rows.D, scale, sums + a * rows.D);
    }
  });
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
