// Products with W^T W, Lanczos runs and alpha of every layer of a ragged batch, in one launch on a
// GPU. The definitions are tbfast/backends/reference_lanczos.py and reference_slq.py.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/quadrature.h"
#include "cuda/spectral_plan.h"
#include "kernels.h"

namespace tb::gpu {

// What a launch is to do. Addresses are the device's, or of pinned memory.
struct SpectralCall {
  bool product = false;    // write A x of given vectors to `out`
  bool fit = false;        // write a row of numbers for every layer to `out`, see quadrature.h
  uintptr_t given = 0;     // float32 (probes, length) for each matrix; 0: random signs
  uintptr_t out = 0;       // float32 as `given`, or float64 (layers, kQuadratureColumns)
  uint64_t seed = 0;       // of the signs
  uint32_t draw = 0;       // which of the draws of this seed
  bool replayed = false;   // add the number of launches so far to `draw`
  uintptr_t finished = 0;  // 0, or a float64 that becomes `sequence` when all is written
  double sequence = 0;
};

// Everything that depends on shapes and options alone. A launch allocates nothing and waits for
// nothing, so it can be captured in a CUDA graph.
class SpectralStep {
 public:
  // names: by layer     memory: bytes that Krylov bases may take
  SpectralStep(const std::vector<Matrix>& matrices, const std::vector<uint32_t>& names,
               int64_t probes, int64_t steps, const FitOptions& options, int64_t memory);

  // The workspace begins with these bytes; what follows may hold anything, but for the counter of
  // launches (uint32), which starts at 0.
  const std::vector<unsigned char>& image() const { return arena_.image(); }
  int64_t workspace_bytes() const { return arena_.size(); }

  // Where a launch leaves the Jacobi matrices: float64 (matrices, probes, steps) twice, int32
  // (matrices, probes).
  int64_t diagonal() const { return diagonal_; }
  int64_t off_diagonal() const { return off_diagonal_; }
  int64_t taken() const { return taken_; }
  int64_t replays() const { return replays_; }

  // Blocks that the widest matrix needs at once, and that all work can use.
  int64_t least_blocks() const { return plan_.widest; }
  int64_t most_blocks() const { return plan_.most_items; }

  // blocks: 0 for as many as fit on the device, if they are of use
  void launch(const SpectralCall& call, uintptr_t workspace, uintptr_t stream,
              int64_t blocks) const;

 private:
  SpectralPlan plan_;
  Arena arena_;
  QuadratureLayout quadrature_;
  int64_t entries_, items_, rounds_, floats_, arrived_, going_, scale_, replays_;
  int64_t diagonal_, off_diagonal_, taken_;
};

}  // namespace tb::gpu
