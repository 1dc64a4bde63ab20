// Randomized singular value decompositions of the matrices of a ragged batch, threaded over them.
// The definition is `rsvd` in tbfast/backends/reference_rsvd.py.
#pragma once

#include <cstdint>
#include <vector>

#include "ragged.h"

namespace tb {

struct RsvdOptions {
  int64_t rank;         // up to the shorter side of every matrix
  int64_t oversample;   // least number of columns of the sketch beyond the rank
  int64_t power_iters;  // how often A A^H is applied to it
  uint64_t seed;
};

// Where the factors of one matrix go: arrays of double where the matrix is of double precision,
// else of float; complex ones (re, im) interleaved.
struct Factors {
  void* u;    // (rows, rank)
  double* s;  // (rank), falling
  void* vh;   // (rank, cols)
};

// A is about U S Vh for every matrix. Returns |A - U S Vh|_F / |A|_F of each, 0 for a zero matrix,
// NaN for one that is not finite, whose factors are then left as they are. Deterministic: a matrix
// and the options alone decide its factors, to the bit.
std::vector<double> rsvd(const std::vector<Matrix>& matrices, const RsvdOptions& options,
                         const std::vector<Factors>& out, int threads);

}  // namespace tb
