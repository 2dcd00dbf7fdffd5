// Loops over threads, which record the threads that worked.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <numeric>

namespace fastokd {

// A bit for each thread of the pool (by its number modulo 64) that ran a part of a loop.
extern std::atomic<uint64_t> busy_threads;

// Calls body(begin, end) for ranges that make up [0, count), of `grain` items each at least.
template <class Body>
void parallel(int64_t count, int64_t grain, Body body) {
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    busy_threads.fetch_or(uint64_t{1} << (at::get_thread_num() & 63), std::memory_order_relaxed);
    body(begin, end);
  });
}

// Into how many pieces, at most `most`, each of `items` is cut to give all threads as many: 1 where the
// items suffice.
inline int64_t pieces(int64_t items, int64_t most) {
  const int64_t threads = at::get_num_threads();
  if (items >= threads || items < 1) return 1;
  return std::max<int64_t>(1, std::min(most, threads / std::gcd(items, threads)));
}

}  // namespace fastokd
