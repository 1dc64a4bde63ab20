// The bridge between Python and the kernels: pointers and sizes, no Python, no torch.
// Sizes and offsets are int64_t throughout. Nothing here keeps a pointer after it returns.
#pragma once

#include <complex>
#include <cstdint>
#include <vector>

namespace tb {

// How xmin is chosen, and why a spectrum has no alpha. The numbers are those of tbfast/fitting.py.
enum class FitKind : int64_t { median = 0, ks = 1, peak = 2, tail = 3 };
enum class Reason : int64_t {
  fitted = 0,
  no_eigenvalues = 1,
  not_finite = 2,
  all_equal = 3,
  no_candidate = 4,
  too_few = 5
};

struct FitOptions {
  FitKind kind = FitKind::median;
  double xmin_pos = 2.0;     // median: xmin has index int(n / xmin_pos)
  double smooth = 0.0;       // median: ln xmin is the mean over int(smooth * n) ranks either side
  int64_t k = 64;            // tail: number of largest eigenvalues
  int64_t bins = 100;        // peak: bins of the histogram of log10
  bool peak_compat = false;  // peak: the published comparison with the log of the lower bound
  double max_alpha = 1e5;    // above it the tail counts as one value repeated
};

struct Fit {
  double alpha;
  double xmin;
  double ks;
  int64_t start;   // index of xmin
  int64_t n_tail;  // n - start
  Reason reason;
};

// Fits a power law to each of `rows` spectra, threaded over spectra, longest first. Threads never
// change the result.
//   values:  all spectra end to end, each ascending and positive (NaN and infinity are found)
//   offsets: rows + 1 positions in values; spectrum r is values[offsets[r]] .. offsets[r + 1]
std::vector<Fit> fit(const double* values, const int64_t* offsets, int64_t rows,
                     const FitOptions& options, int threads);

// Eigenvalues of real symmetric matrices, ascending; single-threaded. Backward stable: each errs by
// a few eps of T times the largest in magnitude.
//   a:   count matrices of n x n, end to end, row-major; only what is on and above the diagonal is
//        read. Entries must be finite and neither overflow nor vanish when squared.
//   out: count x n, overwritten
template <typename T>
void symmetric_eigenvalues(const T* a, int64_t count, int64_t n, double* out);

// The same for complex Hermitian matrices, of which only what is on and above the diagonal is read.
// For small ones: several are worked on at once, and all of that should fit into the cache.
void hermitian_eigenvalues(const std::complex<double>* a, int64_t count, int64_t n, double* out);

// Threads to use: TBFAST_NUM_THREADS, else the cores this process may run on.
// Throws std::invalid_argument when the variable is not a positive number.
int num_threads();

// Instruction sets that the hot loops were compiled for and this machine can run, best last.
std::vector<const char*> available_isas();

// The one in use: TBFAST_ISA, else the best. Throws std::invalid_argument when it cannot be had.
const char* isa();

}  // namespace tb
