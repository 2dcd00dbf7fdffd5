// The record of the threads that worked, which the tests read.
#include "parallel.h"

namespace fastokd {

std::atomic<uint64_t> busy_threads{0};

}  // namespace fastokd

// The number of threads that have worked since the last call.
extern "C" __attribute__((visibility("default"))) int fastokd_busy_threads() {
  return __builtin_popcountll(fastokd::busy_threads.exchange(0, std::memory_order_relaxed));
}
