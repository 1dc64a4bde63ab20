#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "quadrature.h"

namespace tb {
namespace {

// One implicit QL sweep with Wilkinson's shift on rows first .. last (EISPACK's
// imtql2, after Dubrulle), which carries along the first components of the eigenvectors alone.
void sweep(double* d, double* e, double* z, int64_t first, int64_t last) {
  double g = (d[first + 1] - d[first]) / (2 * e[first]);
  double r = std::sqrt(g * g + 1);
  g = d[last] - d[first] + e[first] / (g + std::copysign(r, g));
  double s = 1, c = 1, p = 0;
  for (int64_t i = last - 1; i >= first; --i) {
    const double f = s * e[i], b = c * e[i];
    r = std::sqrt(f * f + g * g);
    e[i + 1] = r;
    if (r == 0) {  // split in the middle
      d[i + 1] -= p;
      e[last] = 0;
      return;
    }
    s = f / r;
    c = g / r;
    g = d[i + 1] - p;
    r = (d[i] - g) * s + 2 * c * b;
    p = s * r;
    d[i + 1] = g + p;
    g = c * r - b;
    const double upper = z[i + 1];
    z[i + 1] = s * z[i] + c * upper;
    z[i] = c * z[i] - s * upper;
  }
  d[first] -= p;
  e[first] = g;
  e[last] = 0;
}

}  // namespace

void gauss_quadrature(const double* diagonal, const double* off_diagonal, int64_t size,
                      double* nodes, double* weights) {
  constexpr double kEps = std::numeric_limits<double>::epsilon();
  constexpr int kSweeps = 60;  // for one eigenvalue; two or three are usual
  double largest = 0;
  for (int64_t i = 0; i < size; ++i) {
    largest = std::max(largest, std::abs(diagonal[i]));
    if (i + 1 < size) largest = std::max(largest, std::abs(off_diagonal[i]));
  }
  int exponent = 0;
  std::frexp(largest, &exponent);
  std::vector<double> d(size), e(size), z(size);
  for (int64_t i = 0; i < size; ++i) {  // near 1, where squares neither overflow nor vanish
    d[i] = std::ldexp(diagonal[i], -exponent);
    e[i] = i + 1 < size ? std::ldexp(off_diagonal[i], -exponent) : 0;
  }
  z[0] = 1;
  for (int64_t first = 0; first < size; ++first) {
    for (int tries = 0; tries < kSweeps; ++tries) {
      int64_t last = first;
      while (last + 1 < size &&
             std::abs(e[last]) > kEps * (std::abs(d[last]) + std::abs(d[last + 1]))) {
        ++last;
      }
      if (last == first) break;
      sweep(d.data(), e.data(), z.data(), first, last);
    }
  }
  std::vector<int64_t> order(size);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return d[a] < d[b]; });
  for (int64_t i = 0; i < size; ++i) {
    nodes[i] = std::ldexp(d[order[i]], exponent);
    weights[i] = z[order[i]] * z[order[i]];
  }
}

}  // namespace tb
