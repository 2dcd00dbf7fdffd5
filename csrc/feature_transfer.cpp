// The dispatcher's side of FFSD's whole-map transfer: threads take chunks of samples, whose sums are added
// in their order, so that no result depends on the number of threads.
//
// With u = x / nx and v = y / ny, |u - v|^2 = u.u + v.v - 2 u.v = (|x - y|^2 - (nx - ny)^2) / (nx ny)
// and u . (u - v) = (|u - v|^2 + u.u - v.v) / 2. The first form cancels where the maps agree, the
// second where their norms differ: each is used where it doesn't.
#include "feature_transfer_kernel.h"

#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>

#include <cmath>
#include <numeric>
#include <vector>

#include "op.h"

namespace fastokd {
namespace {

constexpr double kEps = 1e-12;
constexpr int64_t kChunk = 1 << 12;  // elements

// An empty tensor like a map of any batch stride: samples contiguous, each in the map's layout.
Tensor dense_like(const Tensor& x) {
  Tensor made = at::empty_like(x);
  if (x.size(0) < 2 || (made.stride(0) == x[0].numel() && made[0].strides() == x[0].strides())) {
    return made;
  }
  std::vector<int64_t> strides = x.strides().vec();
  strides[0] = x[0].numel();
  return at::empty_strided(x.sizes(), strides, x.options());
}

Type check_pair(const Tensor& x, const Tensor& y) {
  TORCH_CHECK(x.dim() == 4, "a map must be [B, C, H, W]");
  TORCH_CHECK(y.scalar_type() == x.scalar_type() && y.sizes() == x.sizes() &&
                  (x.size(0) == 0 || y[0].strides() == x[0].strides()),
              "the maps must have one shape, dtype and order of memory");
  TORCH_CHECK(x.size(0) == 0 || x[0].is_non_overlapping_and_dense(), "a sample must be dense");
  return type_of(x, "a map");
}

const char* sample(const Tensor& x, int64_t b) {
  return static_cast<const char*>(x.const_data_ptr()) + b * x.stride(0) * x.element_size();
}

// Calls body(b, first element, elements) for every chunk of every sample of N elements.
template <class Body>
void each_chunk(int64_t B, int64_t N, Body body) {
  const int64_t chunks = (N + kChunk - 1) / kChunk;
  parallel(B * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t first = n % chunks * kChunk;
      body(n / chunks, first, std::min(kChunk, N - first));
    }
  });
}

std::tuple<Tensor, Tensor> feature_pair(const Tensor& x, const Tensor& y) {
  const Type type = check_pair(x, y);
  const int64_t B = x.size(0), N = x.size(1) * x.size(2) * x.size(3);
  Tensor saved_4B = new_float({4, B});
  float* const saved = saved_4B.mutable_data_ptr<float>();
  std::vector<double> parts(B);
  const int64_t chunks = (N + kChunk - 1) / kChunk;
  std::vector<double> chunk_sums(4 * B * chunks);
  each_chunk(B, N, [&](int64_t b, int64_t first, int64_t count) {
    const int64_t at = first * x.element_size();
    FASTOKD_DISPATCH(feature_sums)(type, sample(x, b) + at, sample(y, b) + at, count,
                                   &chunk_sums[4 * (b * chunks + first / kChunk)]);
  });
  for (int64_t b = 0; b < B; ++b) {
    double sums[4] = {};
    for (int64_t n = 4 * b * chunks; n < 4 * (b + 1) * chunks; ++n) sums[n % 4] += chunk_sums[n];
    const double rx = std::sqrt(sums[0]), ry = std::sqrt(sums[1]);
    const double ix = 1.0 / (rx < kEps ? kEps : rx), iy = 1.0 / (ry < kEps ? kEps : ry);
    const double uu = sums[0] * ix * ix, vv = sums[1] * iy * iy;
    const double gap = (rx - ry) * (rx - ry);
    const bool alike = rx >= kEps && ry >= kEps && gap < 0.25 * rx * ry;
    double apart = alike ? (sums[3] - gap) * ix * iy : uu + vv - 2.0 * sums[2] * ix * iy;
    if (apart < 0.0) apart = 0.0;  // a rounding; a NaN goes through
    parts[b] = apart;
    saved[b] = static_cast<float>(ix);
    saved[B + b] = static_cast<float>(iy);
    saved[2 * B + b] = rx < kEps ? 0.0f : static_cast<float>((apart + uu - vv) / 2.0);
    saved[3 * B + b] = ry < kEps ? 0.0f : static_cast<float>((apart + vv - uu) / 2.0);
  }
  const double total = std::accumulate(parts.begin(), parts.end(), 0.0);
  const double count = static_cast<double>(std::max<int64_t>(B * N, 1));
  return {new_number(total / count), saved_4B};
}

std::tuple<Tensor, Tensor> feature_pair_backward(const Tensor& x, const Tensor& y,
                                                 const Tensor& saved_4B, const Tensor& incoming,
                                                 bool need_x, bool need_y) {
  const Type type = check_pair(x, y);
  const int64_t B = x.size(0), N = x.size(1) * x.size(2) * x.size(3);
  Tensor gx = need_x ? dense_like(x) : x.new_empty({0});
  Tensor gy = need_y ? dense_like(y) : y.new_empty({0});
  char* const to_x = need_x ? static_cast<char*>(gx.mutable_data_ptr()) : nullptr;
  char* const to_y = need_y ? static_cast<char*>(gy.mutable_data_ptr()) : nullptr;
  const float* const saved = kept(saved_4B, {4, B}, "saved_4B");
  const double scale = 2.0 * *kept(incoming, {}, "incoming") / static_cast<double>(B * N);
  each_chunk(B, N, [&](int64_t b, int64_t first, int64_t count) {
    const FeatureSample s = {saved[b], saved[B + b], saved[2 * B + b], saved[3 * B + b]};
    const int64_t from = first * x.element_size(), to = b * N * x.element_size() + from;
    FASTOKD_DISPATCH(feature_gradient)(type, sample(x, b) + from, sample(y, b) + from, count, s,
                                       static_cast<float>(scale), to_x ? to_x + to : nullptr,
                                       to_y ? to_y + to : nullptr);
  });
  return {gx, gy};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastokd, CPU, m) {
  m.impl("feature_pair", feature_pair);
  m.impl("feature_pair_backward", feature_pair_backward);
}

}  // namespace fastokd
