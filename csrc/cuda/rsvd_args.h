// What the rsvd kernel is given: tables, the memory it works in, and where results go. Pointers are
// the device's.
#pragma once

#include <cstdint>

#include "cuda/rsvd_plan.h"

namespace tb::gpu {

struct RsvdTable {
  const RsvdItem* items;
  int32_t count;
};

// How far a matrix has come. One block at a time writes it, between two barriers.
struct RsvdState {
  double scale;       // power of two that A is multiplied by
  double square;      // |A|^2, scaled
  double shift;       // of the power step
  double left;        // squared residual, scaled
  int32_t alive;      // 0: A is not finite, or an iteration did not converge
  int32_t rescaled;   // 1: A had to be scaled and read again
  int32_t passes;     // of CholeskyQR: 0 none, 1 there will be another, 2 this is the last one
  int32_t total;      // which of the two products of all R is the last one
  int32_t cancelled;  // 1: the residual has to be summed up entry by entry
};

struct RsvdArgs {
  const RsvdEntry* entries;
  RsvdState* states;
  int32_t matrices;
  RsvdTable products[kSides], tiles[kSides], grams[kSides];
  bool sliced[kSides];
  const double* shifts;  // (iterations): of a power step, in squares of the smallest singular value
  int32_t iterations;    // 0 where no matrix iterates
  int64_t rank;
  uint64_t seed;
  unsigned char* memory;
  unsigned char* factors;
  double* results;  // (matrices, kRsvdResults)
};

}  // namespace tb::gpu
