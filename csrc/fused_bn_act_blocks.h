// A map as blocks of rows for the threads, and what fused_bn_act asks of its tensors.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>

#include "capability.h"
#include "fused_bn_act_kernel.h"

namespace fastokd {
namespace bn_act {

using at::Tensor;

// Rows in blocks whose bounds depend on the shape alone, so that a result does not depend on the
// number of threads: partial sums are of a block, and are added in the blocks' order.
struct Blocks {
  const Kernels* kernels;
  Rows all;
  int64_t step;   // rows of a block
  int64_t count;  // blocks

  explicit Blocks(const Tensor& x_BCHW) {
    const bool bf16 = x_BCHW.scalar_type() == at::kBFloat16;
    kernels = FASTOKD_DISPATCH(bn_act_kernels)(bf16 ? Type::kBFloat16 : Type::kFloat,
                                               capability() == Capability::kAvx512Bf16);
    constexpr int64_t kElements = 1 << 15, kRows = 128, kMost = 256;
    const int64_t channels = x_BCHW.size(1);
    const int64_t rows = x_BCHW.numel() / channels;
    all = {rows, channels, std::lcm(channels, kernels->tile)};
    step = std::max({kElements / channels, kRows, (rows + kMost - 1) / kMost});
    const int64_t group = all.width / channels;
    step = (step + group - 1) / group * group;
    count = (rows + step - 1) / step;
  }

  // A block's first element.
  const void* at(const void* base, int64_t block) const {
    return base ? static_cast<const char*>(base) + offset(block) : nullptr;
  }
  void* at(void* base, int64_t block) const {
    return base ? static_cast<char*>(base) + offset(block) : nullptr;
  }
  int64_t offset(int64_t block) const { return block * step * all.channels * kernels->element; }

  // Calls body(block, its rows) for every block. The same blocks fall to the same thread each time:
  // what it has just read is still in its cache, the last of it most likely, so a second pass goes
  // `backwards`.
  template <class Body>
  void each(bool backwards, Body body) const {
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t block = backwards ? begin + end - 1 - i : i;
        Rows rows = all;
        rows.count = std::min(step, all.count - block * step);
        body(block, rows);
      }
    });
  }
};

// A channel's values side by side `width` times, as the kernels read them.
inline float* repeated(float* to, const float* from, const Rows& rows) {
  for (int64_t lane = 0; lane < rows.width; lane += rows.channels) {
    std::copy(from, from + rows.channels, to + lane);
  }
  return to;
}

inline void check_map(const Tensor& x, const char* name) {
  TORCH_CHECK(x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast), "fused_bn_act: ",
              name, " must be a channels-last map");
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16,
              "fused_bn_act: ", name, " must be float32 or bfloat16, not ", x.scalar_type());
}

inline void check_channels(const Tensor& x, int64_t channels, const char* name) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous() && x.dim() == 1 &&
                  x.size(0) == channels,
              "fused_bn_act: ", name, " must be contiguous float32 of shape [", channels, "]");
}

inline void check_like(const Tensor& other, const Tensor& x, const char* name) {
  check_map(other, name);
  TORCH_CHECK(other.sizes() == x.sizes() && other.scalar_type() == x.scalar_type(),
              "fused_bn_act: ", name, " must have x's shape and dtype");
}

}  // namespace bn_act
}  // namespace fastokd
