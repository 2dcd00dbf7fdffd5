// Chooses the kernels by cpuid; ops/cpp.py can override it (FASTOKD_CPU_CAPABILITY, the tests).
#include "capability.h"

#include <string.h>

#include <atomic>

namespace fastokd {
namespace {

constexpr const char* kNames[] = {"default", "avx2", "avx512", "avx512bf16"};

bool supported(Capability wanted) {
#if FASTOKD_X86
  // These also check that the operating system saves the wide registers.
  __builtin_cpu_init();
  switch (wanted) {
    case Capability::kAvx512Bf16:
      return __builtin_cpu_supports("avx512bf16") && supported(Capability::kAvx512);
    case Capability::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             supported(Capability::kAvx2);
    case Capability::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    default:
      return true;
  }
#else
  return wanted == Capability::kDefault;
#endif
}

Capability best() {
  if (supported(Capability::kAvx512Bf16)) return Capability::kAvx512Bf16;
  if (supported(Capability::kAvx512)) return Capability::kAvx512;
  return supported(Capability::kAvx2) ? Capability::kAvx2 : Capability::kDefault;
}

std::atomic<Capability> current{best()};

}  // namespace

Capability capability() { return current.load(std::memory_order_relaxed); }

}  // namespace fastokd

#define FASTOKD_EXPORT extern "C" __attribute__((visibility("default")))

FASTOKD_EXPORT const char* fastokd_capability() {
  return fastokd::kNames[static_cast<int>(fastokd::capability())];
}

// Switches to the kernels of that name; 0 where this CPU can't run them.
FASTOKD_EXPORT int fastokd_set_capability(const char* name) {
  for (int i = 0; i < 4; ++i) {
    const auto wanted = static_cast<fastokd::Capability>(i);
    if (!strcmp(name, fastokd::kNames[i]) && fastokd::supported(wanted)) {
      fastokd::current.store(wanted, std::memory_order_relaxed);
      return 1;
    }
  }
  return 0;
}
