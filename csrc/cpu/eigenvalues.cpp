// Eigenvalues of symmetric matrices: Householder tridiagonalisation, then the square-root-free QL
// iteration of Pal, Walker and Kahan (Parlett, "The Symmetric Eigenvalue Problem", section 8.15),
// the algorithm of LAPACK's sterf, but four sweeps at a time.
#include <algorithm>
#include <cmath>
#include <complex>
#include <limits>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/workspaces.h"
#include "kernels.h"

namespace tb {
namespace {

constexpr int64_t kDiagonalBlock = 16;  // blocks that tridiagonalize reads whole
constexpr double kTiny = 1e-290;
constexpr int kPatience = 8;     // sweeps of kAtOnce shifts before a single one is tried
constexpr int kSweepsEach = 60;  // per eigenvalue; two or three are usual
constexpr int kAtOnce = 4;       // sweeps; more gain nothing, their divisions queue up

template <typename T>
T* zeros(Buffer<T>& buffer, int64_t size) {
  T* memory = buffer.reserve(size);
  std::fill(memory, memory + size, T(0));
  return memory;
}

// Row-major upper triangle (column-major lower) into padded columns with whole diagonal blocks.
template <typename T>
void copy_padded(const T* from, int64_t n, T* to) {
  const int64_t ld = padded(n);
  for (int64_t c = 0; c < n; ++c) {
    std::copy(from + c * n + c, from + c * n + n, to + c * ld + c);
    for (int64_t r = c - c % kDiagonalBlock; r < c; ++r) to[c * ld + r] = from[r * n + c];
  }
}

// Eigenvalues of [[a, b], [b, c]], the one of larger magnitude exactly, the other from the
// determinant (LAPACK's lae2).
std::pair<double, double> two_by_two(double a, double b, double c) {
  const double sum = a + c;
  const double root = std::hypot(a - c, 2 * b);
  const double large = sum < 0 ? (sum - root) / 2 : (sum + root) / 2;
  if (large == 0) return {0, 0};
  const double big = std::abs(a) > std::abs(c) ? a : c;
  const double small = std::abs(a) > std::abs(c) ? c : a;
  return {large, (big / large) * small - (b / large) * b};
}

// One QL sweep under way.
struct Sweep {
  double shift = 0, gamma = 0, p = 1, c = 1, s = 0;

  void start(double with_shift, double bottom) {
    shift = with_shift;
    gamma = bottom - shift;
    p = gamma * gamma;
  }

  // Rotates rows i and i + 1. That r / p is divided beside 1 / r, instead of gamma^2 by c after it,
  // takes a division out of the chain that a sweep waits for.
  void step(double* d, double* e2, int64_t i) {
    // The sweep before may have left a zero here, and p may be one: 0 / 0.
    const double b = std::max(e2[i], kTiny);
    const double r = p + b;
    const double over_c = r / p;
    const double over_r = 1 / r;
    e2[i + 1] = s * r;
    const double old_c = c;
    c = p * over_r;
    s = b * over_r;
    const double old_gamma = gamma;
    const double alpha = d[i];
    gamma = c * (alpha - shift) - s * old_gamma;
    d[i + 1] = old_gamma + (alpha - gamma);
    p = c >= std::numeric_limits<double>::min() ? gamma * gamma * over_c : old_c * b;
  }

  void finish(double* d, double* e2, int64_t first) const {
    e2[first] = s * p;
    d[first] = shift + gamma;
  }
};

// kCount QL sweeps over rows first..last, from the bottom, each two rows behind the one before:
// the same as one after the other. A single sweep would wait for each division in turn.
template <int kCount>
void sweeps(double* d, double* e2, int64_t first, int64_t last, const double* shifts) {
  constexpr int kLag = 2 * (kCount - 1);
  Sweep under_way[kCount];
  for (int64_t front = last - 1; front + kLag >= first - 1; --front) {
    if (front >= first && front + kLag < last - 1) {
      for (int k = 0; k < kCount; ++k) under_way[k].step(d, e2, front + 2 * k);
      continue;
    }
    for (int k = 0; k < kCount; ++k) {
      const int64_t i = front + 2 * k;
      if (i == last - 1) under_way[k].start(shifts[k], d[last]);
      if (i >= first && i < last) under_way[k].step(d, e2, i);
      if (i == first - 1) under_way[k].finish(d, e2, first);
    }
  }
}

// The eigenvalue of the top 2 x 2 that is nearer to its first diagonal element (Wilkinson).
double top_shift(const double* d, const double* e2) {
  const double off = std::sqrt(e2[0]);
  const double half_gap = (d[1] - d[0]) / (2 * off);
  return d[0] - off / (half_gap + std::copysign(std::hypot(half_gap, 1.0), half_gap));
}

// Eigenvalues of a tridiagonal matrix into d, unsorted. d: n, e2: squares of n - 1, room for n.
void tridiagonal_eigenvalues(double* d, double* e2, int64_t n) {
  constexpr double kEps = std::numeric_limits<double>::epsilon() / 2;
  double norm = 0;
  for (int64_t i = 0; i < n; ++i) norm = std::max(norm, std::abs(d[i]));
  for (int64_t i = 0; i + 1 < n; ++i) norm = std::max(norm, std::sqrt(e2[i]));
  // The second term ends the iteration on rounding noise around a zero diagonal: it changes no
  // eigenvalue by more than a thousandth of the reduction's own error.
  const double noise = 1e-3 * kEps * norm;
  const auto splits = [&](int64_t i) {
    return e2[i] <= kEps * kEps * std::abs(d[i]) * std::abs(d[i + 1]) + noise * noise;
  };
  int64_t budget = kSweepsEach * n;
  for (int64_t first = 0; first < n;) {
    int64_t last = first;  // of the block that does not split
    while (last + 1 < n && !splits(last)) ++last;
    const int64_t end = last;
    // QL finds the eigenvalues at the top first: turn a block whose small end is at the bottom.
    if (std::abs(d[end]) < std::abs(d[first])) {
      std::reverse(d + first, d + end + 1);
      std::reverse(e2 + first, e2 + end);
    }
    int stuck = 0;  // sweeps since an eigenvalue was found
    while (first <= end) {
      last = first;
      while (last < end && !splits(last)) ++last;
      if (last == first) {
        ++first;
        stuck = 0;
      } else if (last == first + 1) {
        std::tie(d[first], d[last]) = two_by_two(d[first], std::sqrt(e2[first]), d[last]);
        first += 2;
        stuck = 0;
      } else if (--budget < 0) {
        throw std::runtime_error("the eigenvalue iteration did not converge");
      } else if (last - first < 3 * kAtOnce || ++stuck > kPatience) {
        // Many shifts at once may run in circles; this one shift at a time never does.
        const double shift = top_shift(d + first, e2 + first);
        sweeps<1>(d, e2, first, last, &shift);
      } else {
        double shifts[kAtOnce], off[kAtOnce];
        std::copy(d + first, d + first + kAtOnce, shifts);
        std::copy(e2 + first, e2 + first + kAtOnce, off);
        tridiagonal_eigenvalues(shifts, off, kAtOnce);
        sweeps<kAtOnce>(d, e2, first, last, shifts);
      }
    }
  }
}

void tridiagonalize(float* a, int64_t n, double* d, double* e, float* work) {
  kernels().tridiagonalize_f32(a, n, d, e, work);
}

void tridiagonalize(double* a, int64_t n, double* d, double* e, double* work) {
  kernels().tridiagonalize_f64(a, n, d, e, work);
}

}  // namespace

template <typename T>
void symmetric_eigenvalues(const T* a, int64_t count, int64_t n, double* out) {
  std::vector<double> off_diagonal(n);
  Buffer<T> columns, scratch;
  for (int64_t i = 0; i < count; ++i) {
    T* matrix = zeros(columns, padded(n) * padded(n));
    T* work = zeros(scratch, tridiagonal_work(n));
    double* values = out + i * n;
    copy_padded(a + i * n * n, n, matrix);
    tridiagonalize(matrix, n, values, off_diagonal.data(), work);
    for (double& e : off_diagonal) e *= e;
    tridiagonal_eigenvalues(values, off_diagonal.data(), n);
    std::sort(values, values + n);
  }
}

void hermitian_eigenvalues(const std::complex<double>* a, int64_t count, int64_t n, double* out) {
  constexpr int64_t kStep = 2 * kTogether;
  Buffer<double> lanes, scratch;
  double* matrices = lanes.reserve(kStep * n * n);
  double* diagonal = scratch.reserve(3 * kStep * n);
  double* squares = diagonal + kTogether * n;
  double* work = squares + kTogether * n;
  std::vector<double> off_diagonal(n);
  for (int64_t first = 0; first < count; first += kTogether) {
    const int64_t here = std::min(kTogether, count - first);
    std::fill(matrices, matrices + kStep * n * n, 0.0);
    for (int64_t lane = 0; lane < here; ++lane) {
      const std::complex<double>* from = a + (first + lane) * n * n;
      // The lower triangle of the transpose, which has the same eigenvalues.
      for (int64_t j = 0; j < n; ++j) {
        for (int64_t i = j; i < n; ++i) {
          double* to = matrices + kStep * (j * n + i) + lane;
          to[0] = from[j * n + i].real();
          to[kTogether] = from[j * n + i].imag();
        }
      }
    }
    kernels().tridiagonalize_hermitian(matrices, n, diagonal, squares, work);
    for (int64_t lane = 0; lane < here; ++lane) {
      double* values = out + (first + lane) * n;
      for (int64_t i = 0; i < n; ++i) values[i] = diagonal[kTogether * i + lane];
      for (int64_t i = 0; i + 1 < n; ++i) off_diagonal[i] = squares[kTogether * i + lane];
      tridiagonal_eigenvalues(values, off_diagonal.data(), n);
      std::sort(values, values + n);
    }
  }
}

template void symmetric_eigenvalues(const float*, int64_t, int64_t, double*);
template void symmetric_eigenvalues(const double*, int64_t, int64_t, double*);

}  // namespace tb
