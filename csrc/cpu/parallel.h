// A loop over independent tasks on a few threads.
#pragma once

#include <cstdint>
#include <functional>

namespace tb {

// Calls task(i) for i in [0, count), each once, on up to `threads` threads (the caller is one of
// them). Tasks are handed out in order, so put the longest first. The first exception is rethrown
// when all threads have stopped.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t)>& task);

}  // namespace tb
