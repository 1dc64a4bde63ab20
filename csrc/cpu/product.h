// y = A x for A = W^T W, or W W^T where that is smaller, reading W once.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "ragged.h"

namespace tb {

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// One matrix seen as a tall one, and cut into slices of rows. The slices depend on the shape alone:
// their sums are added in order, whoever computes them, so that threads never change a bit.
class Product {
 public:
  // W times `scale` stands in for W.
  Product(const Matrix& matrix, double scale);

  const Kernels& kernels() const { return kernels_; }
  int64_t length() const { return length_; }  // of a vector, padding included
  int64_t slices() const { return slices_; }

  // Floats of scratch that one slice needs.
  int64_t scratch(int64_t probes) const;

  // y = W^T W x over the rows of one slice; x and y are (probes, length) with zeros beyond the
  // length of the matrix, probes a multiple of kProbes.
  void slice(int64_t index, int64_t probes, const float* x, float* y, float* scratch) const;

 private:
  bool multiplies_bf16(int64_t probes) const;
  void slice_bf16(int64_t first, int64_t rows, int64_t probes, const float* x, float* y,
                  float* scratch) const;
  const float* panel(int64_t first, int64_t rows, float* scratch, int64_t* ld) const;
  Ahead ahead(int64_t first, int64_t probes) const;
  const char* place(int64_t row) const { return data_ + row / parts_ * row_stride_ * element_; }

  const Kernels& kernels_;  // looked up once: it asks the environment
  const char* data_;
  DType dtype_;
  int64_t rows_, cols_;  // of the real, tall matrix
  int64_t row_stride_, col_stride_;
  int64_t element_;  // bytes
  int64_t parts_;    // real rows and columns for each stored one: 2 if complex
  double scale_;
  bool conjugate_;
  int64_t columns_;  // with padding
  int64_t length_, panel_rows_, slice_rows_, slices_;
};

}  // namespace tb
