// Small dense matrices of doubles: what is left of a decomposition once tall blocks are multiplied.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/workspaces.h"

namespace tb {

// A square matrix, row by row. A complex one is stored in its real form, where x + iy is the block
//    x y
//   -y x
// so that row 2i + 1 is i times row 2i and products, transposes and inverses of the real forms are
// those of the complex matrices.
class Small {
 public:
  Small(int64_t order, int64_t parts);  // zero
  static Small identity(int64_t order, int64_t parts);

  int64_t order() const { return order_; }  // of the real form
  int64_t parts() const { return parts_; }  // 2 if complex
  int64_t ld() const { return ld_; }        // whole vectors; zeros beyond the order
  double* row(int64_t i) { return data_ + i * ld_; }
  const double* row(int64_t i) const { return data_ + i * ld_; }

  // Makes row i + 1 what it is in the real form of a complex matrix whose row i is known.
  void complete(int64_t i);

 private:
  int64_t order_, parts_, ld_;
  Buffer<double> memory_;
  double* data_;
};

// Upper triangular R with R^H R = G in place of a Hermitian G of which the upper triangle is read.
// Pivots below `floor` are raised to it and their columns noted in `low`; the smallest is returned.
double cholesky(Small& g, double floor, std::vector<int64_t>& low);

// The inverse of an upper triangular matrix, and the product of two of them.
Small inverse(const Small& r);
Small product(const Small& a, const Small& b);

// The squares of the smallest and of the largest singular value of an upper triangular matrix.
std::pair<double, double> extreme_squares(const Small& r);

// R = J S W^H with falling S and orthonormal J and W, also where R is rank deficient.
struct SmallSvd {
  std::vector<double> values;  // S, order / parts of them
  Small left, right;           // J and W
};

// The cosine between any two columns of W S is brought below `tolerance`.
SmallSvd svd(const Small& r, double tolerance);

}  // namespace tb
