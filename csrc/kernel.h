// Names shared by a kernel's unit (X_kernel.cpp, compiled once for each instruction set) and the
// dispatcher's side (X.cpp). Units include neither ATen nor the C++ library.
#pragma once

#include <stdint.h>

// In X_kernel.h, inside namespace fastokd: declares name_default, name_avx2 and name_avx512.
#define FASTOKD_DECLARE(result, name, ...) \
  result name##_default(__VA_ARGS__);      \
  result name##_avx2(__VA_ARGS__);         \
  result name##_avx512(__VA_ARGS__)

// In X_kernel.cpp: this unit's name for it.
#define FASTOKD_JOIN2(a, b) a##_##b
#define FASTOKD_JOIN(a, b) FASTOKD_JOIN2(a, b)
#define FASTOKD_KERNEL(name) FASTOKD_JOIN(name, FASTOKD_CAPABILITY)

namespace fastokd {

// Element types that kernels read and write; arithmetic is always float.
enum class Type : int32_t { kFloat, kBFloat16, kHalf };

}  // namespace fastokd
