// What the dispatcher's sides of the operators (X.cpp) share.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "capability.h"
#include "parallel.h"

namespace fastokd {

using at::Tensor;
using std::optional;

// An operator by its name, to be called through the dispatcher.
template <class Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// A dense tensor of the CPU in a type that kernels read.
inline Type type_of(const Tensor& x, const char* name) {
  const auto scalar = x.scalar_type();
  TORCH_CHECK(x.device().is_cpu() && x.layout() == at::kStrided, name, " is on ", x.device(),
              " with layout ", x.layout(), ": it must be a dense CPU tensor");
  TORCH_CHECK(scalar == at::kFloat || scalar == at::kBFloat16 || scalar == at::kHalf, name, " is ",
              scalar, ": it must be float32, bfloat16 or float16");
  return scalar == at::kFloat ? Type::kFloat : scalar == at::kHalf ? Type::kHalf : Type::kBFloat16;
}

// What an operator keeps for its backward, or the incoming gradient.
inline const float* kept(const Tensor& x, at::IntArrayRef shape, const char* name) {
  TORCH_CHECK(x.scalar_type() == at::kFloat && x.is_contiguous() && x.sizes() == shape, name,
              " must be contiguous float32 of shape ", shape, ", not ", x.scalar_type(), " of ",
              x.sizes());
  return x.const_data_ptr<float>();
}

// Allocated without the dispatcher, whose overhead is larger than the allocation's.
inline Tensor new_float(at::IntArrayRef shape) {
  return Tensor(at::detail::empty_cpu(shape, at::kFloat));
}
inline Tensor new_number(double x) {
  Tensor number = new_float({});
  *number.mutable_data_ptr<float>() = static_cast<float>(x);
  return number;
}
inline Tensor new_channels_last(at::IntArrayRef shape, at::ScalarType type) {
  return Tensor(at::detail::empty_cpu(shape, type, false, at::MemoryFormat::ChannelsLast));
}
inline bool is_channels_last(const Tensor& x) {
  return x.dim() == 4 && x.is_contiguous(at::MemoryFormat::ChannelsLast);
}

}  // namespace fastokd
