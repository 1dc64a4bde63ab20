// Reading and writing at a place of a file or of memory.
#pragma once

#include <cstdint>

#include "merge.h"

namespace tb {

// errno of what went wrong; 0 if nothing, kEndOfFile if the file ends before.
constexpr int kEndOfFile = -1;
int read_at(const Place& place, int64_t from, int64_t bytes, char* to);
int write_at(const Place& place, int64_t at, int64_t bytes, const char* from);

// Reads bytes of an input; throws MergeFault.
void read_input(const Merge& what, int64_t tensor, size_t input, int64_t from, int64_t bytes,
                char* to);

}  // namespace tb
