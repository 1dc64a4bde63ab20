// Which thread works on what: longest first, and all of them on what is too long for one.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "ragged.h"

namespace tb {

// Calls task(index, threads) once for every matrix: first, one after the other, for those that all
// threads should share, then side by side with threads = 1 for the others, largest first. Tasks
// must give the same result for any number of threads.
void for_each_matrix(const std::vector<Matrix>& matrices, int threads,
                     const std::function<void(int64_t, int)>& task);

}  // namespace tb
