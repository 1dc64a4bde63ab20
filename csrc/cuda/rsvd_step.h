// Randomized singular value decompositions of the matrices of a ragged batch, and alpha of their
// tails, in one launch on a GPU. The definition is `rsvd` in tbfast/backends/reference_rsvd.py.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/arena.h"
#include "cuda/rsvd_plan.h"
#include "rsvd.h"

namespace tb::gpu {

// Everything that depends on shapes and options alone; the seed of the options is of no account. A
// launch allocates nothing and waits for nothing, so it can be captured in a CUDA graph.
class RsvdStep {
 public:
  // Throws std::invalid_argument where a rank or a sketch is too large for a matrix.
  RsvdStep(const std::vector<Matrix>& matrices, const RsvdOptions& options);

  // The workspace begins with these bytes; what follows may hold anything.
  const std::vector<unsigned char>& image() const { return arena_.image(); }
  int64_t workspace_bytes() const { return arena_.size(); }

  // Where U (rows, rank), S (rank) in double and Vh (rank, cols) of each matrix begin among the
  // factors, in bytes.
  const std::vector<RsvdEntry>& entries() const { return plan_.entries; }
  int64_t factors_bytes() const { return plan_.out_bytes; }

  // Blocks that all work can use.
  int64_t most_blocks() const { return plan_.most_items; }

  // factors: device memory     results: float64 (matrices, kRsvdResults), may be pinned memory:
  //   the relative residual, NaN for a matrix that is not finite and infinity where an iteration
  //   did not converge: the factors then mean nothing;
  //   alpha of the squares of the `rank` largest singular values (Hill), NaN where there is none;
  //   how often the matrix was read.
  // blocks: 0 for as many as fit on the device, if they are of use
  void launch(uintptr_t workspace, uintptr_t factors, uintptr_t results, uint64_t seed,
              uintptr_t stream, int64_t blocks) const;

 private:
  int64_t rank_;
  RsvdPlan plan_;
  Arena arena_;
  int64_t entries_, products_[kSides], tiles_[kSides], grams_[kSides], shifts_, states_, memory_;
};

}  // namespace tb::gpu
