// From Lanczos tridiagonals to alpha on a GPU: what the phases of quadrature.cuh are given, and how
// a plan lays it out. The definition is tbfast/backends/reference_slq.py.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/arena.h"
#include "kernels.h"
#include "portable.h"

namespace tb::gpu {

// Columns of the results, one row for each layer: alpha, xmin, ks, start, n_tail, reason, n_zeros,
// max_eigenvalue, sum_eigenvalues, sketch_error.
constexpr int64_t kQuadratureColumns = 10;

// Dynamic shared memory, in bytes, that a kernel must have to call quadrature_phases.
constexpr int64_t kQuadratureShared = 8192;

constexpr int64_t kGridPoints = 1024;  // most points of the mean of a layer's curves
constexpr int64_t kFiner = 4;          // pieces that an interval between two nodes is cut into

// Most points of the curve of one run.
TB_DEVICE inline int64_t curve_width(int64_t steps) { return kFiner * steps + 1; }

// A layer's part of the work. Offsets are in doubles of QuadratureArgs::scratch.
struct QuadratureLayer {
  int64_t layer;        // its row in the results
  int64_t first, last;  // its matrices are first .. last
  int64_t count;        // eigenvalues of all of them
  int64_t sorted;       // (sorted_size): points of all its curves
  int64_t pool;         // (probes + 3, kGridPoints + 1): grid, sum, running maximum, by probe
  int64_t spectrum;     // (3, count + 1): eigenvalues, their logarithms, sums of these
  int64_t sorted_size;  // a power of two
};

// Pointers are the device's.
struct QuadratureArgs {
  const double* diagonal;      // (runs, steps), run = matrix * probes + probe
  const double* off_diagonal;  // (runs, steps)
  const int32_t* taken;        // (runs)
  const int64_t* count;        // (matrices): eigenvalues each stands for
  const QuadratureLayer* layers;
  int64_t layer_count, runs, probes, steps;
  double eps;  // of the arithmetic that Lanczos ran in
  FitOptions options;

  double* nodes;    // (steps, 3 * runs): Gauss rules of all steps, of half and of a quarter of them
  double* weights;  // likewise
  double* coupled;  // likewise: off-diagonals on their way to zero
  double* x;        // (runs, curve_width): curves
  double* mass;     // likewise
  double* totals;   // (runs)
  int64_t* points;  // (runs): length of each curve
  double* scratch;

  double* results;  // (layer_count, kQuadratureColumns)
};

// Where all of that lies in a workspace; host only. Tables come before anything else in an arena.
class QuadratureLayout {
 public:
  // first:  (layers + 1): matrices of layer l are first[l] .. first[l + 1]
  // count:  (matrices): eigenvalues each stands for
  QuadratureLayout(const std::vector<int64_t>& first, const std::vector<int64_t>& count,
                   int64_t probes, int64_t steps, double eps, const FitOptions& options);

  void put_tables(Arena& arena);
  void take_scratch(Arena& arena);

  // The rest are addresses of the device, of the shapes above.
  QuadratureArgs args(uintptr_t workspace, const double* diagonal, const double* off_diagonal,
                      const int32_t* taken, double* results) const;

  int64_t layers() const { return static_cast<int64_t>(layers_.size()); }

 private:
  std::vector<QuadratureLayer> layers_;  // largest first
  std::vector<int64_t> count_;
  int64_t probes_, steps_;
  double eps_;
  FitOptions options_;
  int64_t doubles_ = 0;  // of scratch
  int64_t layers_at_ = 0, count_at_ = 0, nodes_ = 0, weights_ = 0, coupled_ = 0, x_ = 0, mass_ = 0,
          totals_ = 0, points_ = 0, scratch_ = 0;
};

}  // namespace tb::gpu
