// The multiply-adds that a core can do, on registers alone.
#pragma once

#include "kernel.h"

namespace fastokd {

// Runs `rounds` of independent multiply-adds: of floats, or of bfloat16 pairs where `bf16`. Returns the
// FLOPs of a round, or 0 for an instruction that the unit hasn't.
FASTOKD_DECLARE(int64_t, multiply_adds, int64_t rounds, bool bf16);

}  // namespace fastokd
