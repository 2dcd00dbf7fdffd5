// Which instruction set's kernels run in this process.
#pragma once

#include "kernel.h"

namespace fastokd {

// kAvx512Bf16 runs the units of kAvx512, whose kernels may then convert by its instructions.
enum class Capability { kDefault, kAvx2, kAvx512, kAvx512Bf16 };

Capability capability();

}  // namespace fastokd

// The unit of kernel `name` that this process runs: FASTOKD_DISPATCH(x_range)(args, begin, end).
#if FASTOKD_X86
#define FASTOKD_DISPATCH(name)                                                   \
  (::fastokd::capability() >= ::fastokd::Capability::kAvx512  ? ::fastokd::name##_avx512 \
   : ::fastokd::capability() == ::fastokd::Capability::kAvx2 ? ::fastokd::name##_avx2   \
                                                             : ::fastokd::name##_default)
#else
#define FASTOKD_DISPATCH(name) ::fastokd::name##_default
#endif
