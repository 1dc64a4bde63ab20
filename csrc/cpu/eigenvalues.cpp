// Eigenvalues of symmetric matrices: Householder tridiagonalisation, then the square-root-free QL
// iteration of Pal, Walker and Kahan (Parlett, "The Symmetric Eigenvalue Problem", section 8.15),
// the algorithm of LAPACK's sterf.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "kernels.h"

namespace tb {
namespace {

constexpr int64_t kDiagonalBlock = 16;  // blocks that tridiagonalize reads whole
constexpr int kSweeps = 60;             // per eigenvalue; two or three are usual

struct AlignedFree {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(64)); }
};

template <typename T>
using Buffer = std::unique_ptr<T[], AlignedFree>;

template <typename T>
Buffer<T> zeros(int64_t size) {
  const auto bytes = static_cast<size_t>(size) * sizeof(T);
  T* memory = static_cast<T*>(::operator new(bytes, std::align_val_t(64)));
  std::fill(memory, memory + size, T(0));
  return Buffer<T>(memory);
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

// One QL sweep over rows first..last with the shift of the top 2 x 2; e2 are squares.
void sweep(double* d, double* e2, int64_t first, int64_t last) {
  const double off = std::sqrt(e2[first]);
  const double half_gap = (d[first + 1] - d[first]) / (2 * off);
  const double shift =
      d[first] - off / (half_gap + std::copysign(std::hypot(half_gap, 1.0), half_gap));
  double c = 1, s = 0;
  double gamma = d[last] - shift;
  double p = gamma * gamma;
  for (int64_t i = last - 1; i >= first; --i) {
    const double b = e2[i];
    const double r = p + b;
    if (i != last - 1) e2[i + 1] = s * r;
    const double old_c = c;
    c = p / r;
    s = b / r;
    const double old_gamma = gamma;
    const double alpha = d[i];
    gamma = c * (alpha - shift) - s * old_gamma;
    d[i + 1] = old_gamma + (alpha - gamma);
    p = c != 0 ? gamma * gamma / c : old_c * b;
  }
  e2[first] = s * p;
  d[first] = shift + gamma;
}

// Eigenvalues of a tridiagonal matrix into d, unsorted. d: n, e2: squares of n - 1.
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
  int64_t budget = kSweeps * n;
  for (int64_t first = 0; first < n;) {
    int64_t last = first;  // of the block that does not split
    while (last + 1 < n && !splits(last)) ++last;
    const int64_t end = last;
    // QL finds the eigenvalues at the top first: turn a block whose small end is at the bottom.
    if (std::abs(d[end]) < std::abs(d[first])) {
      std::reverse(d + first, d + end + 1);
      std::reverse(e2 + first, e2 + end);
    }
    while (first <= end) {
      last = first;
      while (last < end && !splits(last)) ++last;
      if (last == first) {
        ++first;
      } else if (last == first + 1) {
        std::tie(d[first], d[last]) = two_by_two(d[first], std::sqrt(e2[first]), d[last]);
        first += 2;
      } else if (--budget < 0) {
        throw std::runtime_error("the eigenvalue iteration did not converge");
      } else {
        sweep(d, e2, first, last);
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
  for (int64_t i = 0; i < count; ++i) {
    const Buffer<T> matrix = zeros<T>(padded(n) * padded(n));
    const Buffer<T> work = zeros<T>(tridiagonal_work(n));
    double* values = out + i * n;
    copy_padded(a + i * n * n, n, matrix.get());
    tridiagonalize(matrix.get(), n, values, off_diagonal.data(), work.get());
    for (double& e : off_diagonal) e *= e;
    tridiagonal_eigenvalues(values, off_diagonal.data(), n);
    std::sort(values, values + n);
  }
}

template void symmetric_eigenvalues(const float*, int64_t, int64_t, double*);
template void symmetric_eigenvalues(const double*, int64_t, int64_t, double*);

}  // namespace tb
