// One-sided Jacobi: rotates the rows of a small matrix until they are orthogonal (Hestenes 1958; de
// Rijk 1989 for keeping the longer row in front). Compiled once per instruction set.
#include <cstdint>

#include "cpu/isa.h"
#include "cpu/vec.h"

namespace tb {
namespace TB_ISA {
namespace {

using V = Vec<double>;

inline double dot(const double* x, const double* y, int64_t n) {
  V sum[2] = {V::zero(), V::zero()};
  int64_t i = 0;
  for (; i + 2 * V::size <= n; i += 2 * V::size) {
    for (int j = 0; j < 2; ++j) {
      sum[j].add_product(V::load(x + i + j * V::size), V::load(y + i + j * V::size));
    }
  }
  if (i < n) sum[0].add_product(V::load(x + i), V::load(y + i));
  return (sum[0] + sum[1]).sum();
}

// (x, y) <- (c x - s y, s x + c y)
inline void rotate(double* x, double* y, int64_t n, double c, double s) {
  const V cosine = V::fill(c), sine = V::fill(s), minus = V::fill(-s);
  for (int64_t i = 0; i < n; i += V::size) {
    const V a = V::load(x + i), b = V::load(y + i);
    V left = V::zero(), right = V::zero();
    left.add_product(cosine, a);
    left.add_product(minus, b);
    right.add_product(sine, a);
    right.add_product(cosine, b);
    left.store(x + i);
    right.store(y + i);
  }
}

}  // namespace

bool jacobi_sweep(double* rows, int64_t count, int64_t length, int64_t ld, int64_t parts,
                  double tolerance, double* squares) {
  bool rotated = false;
  for (int64_t p = 0; p < count; p += parts) {
    squares[p] = dot(rows + p * ld, rows + p * ld, length);
  }
  for (int64_t p = 0; p < count; p += parts) {
    double* x = rows + p * ld;
    for (int64_t q = p + parts; q < count; q += parts) {
      double* y = rows + q * ld;
      double product = dot(x, y, length);
      const double imaginary = parts == 2 ? dot(x + ld, y, length) : 0;
      const double square = product * product + imaginary * imaginary;
      if (square <= tolerance * tolerance * squares[p] * squares[q]) continue;
      rotated = true;
      if (parts == 2) {  // a change of the phase of y makes the product real
        const double modulus = square_root(square);
        rotate(y, y + ld, ld, product / modulus, imaginary / modulus);
        product = modulus;
      }
      const double cotangent = (squares[q] - squares[p]) / (2 * product);
      const double root = square_root(1 + cotangent * cotangent);
      const double tangent = 1 / (cotangent < 0 ? cotangent - root : cotangent + root);
      double c = 1 / square_root(1 + tangent * tangent);
      double s = c * tangent;
      double longer = squares[p] - tangent * product, shorter = squares[q] + tangent * product;
      if (longer < shorter) {
        const double exchanged = longer;
        longer = shorter;
        shorter = exchanged;
        const double cosine = c;
        c = s;
        s = -cosine;
      }
      rotate(x, y, ld, c, s);
      if (parts == 2) rotate(x + ld, y + ld, ld, c, s);
      squares[p] = longer;
      squares[q] = shorter;
    }
  }
  return rotated;
}

}  // namespace TB_ISA
}  // namespace tb
