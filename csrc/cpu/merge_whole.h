// What has to be known of a whole tensor before any of it is merged.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/merge_block.h"
#include "merge.h"

namespace tb {

// Whether a method reads a tensor before it merges any of it.
bool looks_at_all(const Merge& what);

// Reads the tensor where the method needs it: SLERP and DARE with the L1 norm once, TIES twice, a
// large tensor of many equal differences perhaps more often.
Whole examine(const Merge& what, int64_t tensor, const Kernels& isa, int threads);

// The `rank`-th largest magnitude of the differences of each model to the base, exactly and without
// sorting them: bounds from a sample, one pass that counts what lies outside them and keeps what
// lies between, and again with closer bounds where that was too much or the sample misled.
std::vector<double> magnitudes_of_rank(const Merge& what, int64_t tensor, int64_t rank,
                                       const Kernels& isa, int threads);

}  // namespace tb
