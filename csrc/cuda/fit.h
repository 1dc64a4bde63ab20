// Power-law fits on a GPU: of many spectra, and of what Lanczos runs tell of theirs; one launch
// each. The definitions are tbfast/backends/reference_fit.py and reference_slq.py.
//
// A plan is all that depends on shapes and options alone. Its launch allocates nothing and waits
// for nothing, so it can be captured in a CUDA graph. Addresses are the device's, of results also
// those of pinned memory. The workspace begins with the image; what follows may hold anything.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/quadrature.h"
#include "kernels.h"

namespace tb::gpu {

// One block fits one spectrum, the largest first.
class FitPlan {
 public:
  // offsets: (rows + 1): spectrum r is values[offsets[r]] .. offsets[r + 1]
  FitPlan(const std::vector<int64_t>& offsets, const FitOptions& options);

  const std::vector<unsigned char>& image() const { return arena_.image(); }
  int64_t workspace_bytes() const { return arena_.size(); }

  // values:  float64, each spectrum ascending and positive (NaN and infinity are found)
  // results: float64 (rows, 6), overwritten: alpha, xmin, ks, start, n_tail, reason
  // blocks:  0 for as many as fit on the device, if they are of use
  void launch(uintptr_t values, uintptr_t workspace, uintptr_t results, uintptr_t stream,
              int64_t blocks) const;

 private:
  Arena arena_;
  FitOptions options_;
  int64_t rows_;
  int64_t offsets_, order_, logs_, suffix_;
};

// quadrature_fit of given Jacobi matrices, see quadrature.cuh.
class QuadraturePlan {
 public:
  // first: (layers + 1): matrices of layer l are first[l] .. first[l + 1]
  // count: (matrices): eigenvalues each stands for     eps: of the arithmetic Lanczos ran in
  QuadraturePlan(const std::vector<int64_t>& first, const std::vector<int64_t>& count,
                 int64_t probes, int64_t steps, double eps, const FitOptions& options);

  const std::vector<unsigned char>& image() const { return arena_.image(); }
  int64_t workspace_bytes() const { return arena_.size(); }

  // diagonal, off_diagonal: float64 (matrices, probes, steps)     taken: int32 (matrices, probes)
  // results: float64 (layers, kQuadratureColumns), overwritten
  // blocks:  0 for as many as fit on the device, if they are of use
  void launch(uintptr_t diagonal, uintptr_t off_diagonal, uintptr_t taken, uintptr_t workspace,
              uintptr_t results, uintptr_t stream, int64_t blocks) const;

 private:
  Arena arena_;
  QuadratureLayout layout_;
};

}  // namespace tb::gpu
