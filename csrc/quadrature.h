// From Lanczos tridiagonals to alpha: Gauss quadrature of each spectral distribution, a synthetic
// spectrum of its quantiles, the fit of that spectrum and its standard error.
// The definition is tbfast/backends/reference_slq.py.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace tb {

// Jacobi matrices of independent Lanczos runs, `probes` of them for each matrix.
struct Tridiagonals {
  int64_t steps = 0;
  int64_t probes = 0;
  std::vector<double> diagonal;      // (matrices, probes, steps)
  std::vector<double> off_diagonal;  // (matrices, probes, steps); [taken - 1] and on are not read
  std::vector<int32_t> taken;        // (matrices, probes): steps before the run ended, >= 1
  std::vector<int64_t> first;  // (layers + 1): matrices of layer l are first[l] .. first[l + 1]
  std::vector<int64_t> count;  // (matrices): number of eigenvalues each stands for
  std::vector<double> eps;     // (matrices): epsilon of the arithmetic Lanczos ran in
};

// A fit of an estimated spectrum.
struct SketchFit {
  Fit fit;                 // of the eigenvalues that are not numerically zero
  int64_t n_zeros;         // estimated number of those that are
  double max_eigenvalue;   // the largest Ritz value; NaN if not finite
  double sum_eigenvalues;  // estimated trace
  double sketch_error;     // standard error of alpha against that of the exact spectrum
};

// Fits every layer, threaded over layers. Neither threads nor the other layers change a result.
std::vector<SketchFit> quadrature_fit(const Tridiagonals& runs, const FitOptions& options,
                                      int threads);

// Gauss quadrature of a Jacobi matrix (Golub and Welsch, "Calculation of Gauss quadrature rules",
// Math. Comp. 23 (1969)): its eigenvalues, ascending, and the squared first components of its
// normalised eigenvectors, which sum to 1.
//   diagonal: size     off_diagonal: size - 1     nodes, weights: size, overwritten
void gauss_quadrature(const double* diagonal, const double* off_diagonal, int64_t size,
                      double* nodes, double* weights);

}  // namespace tb
