// The multiply-adds of `fastokd bench`, called by ctypes, which lets other threads run meanwhile.
#include "peak_kernel.h"

#include "capability.h"

extern "C" __attribute__((visibility("default"))) int64_t fastokd_multiply_adds(int64_t rounds,
                                                                                 int bf16) {
  if (bf16 && fastokd::capability() != fastokd::Capability::kAvx512Bf16) return 0;
  return FASTOKD_DISPATCH(multiply_adds)(rounds, bf16);
}
