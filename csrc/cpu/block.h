// Tall blocks of few columns, and their products with any matrix and with small ones.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/isa.h"
#include "cpu/small.h"
#include "cpu/workspaces.h"
#include "ragged.h"

namespace tb {

// Rows of `width` real numbers, complex ones (re, im) interleaved. What lies between a row and the
// next is of no account.
template <typename T>
class Block {
 public:
  void resize(int64_t rows, int64_t width);  // all zero; memory is kept where it suffices

  int64_t rows() const { return rows_; }
  int64_t width() const { return width_; }
  int64_t ld() const { return ld_; }  // whole cache lines
  T* row(int64_t i) { return data_ + i * ld_; }
  const T* row(int64_t i) const { return data_ + i * ld_; }

 private:
  int64_t rows_ = 0, width_ = 0, ld_ = 0;
  Buffer<T> memory_;
  T* data_ = nullptr;
};

// A matrix times a scale, or its adjoint.
class View {
 public:
  View(const Matrix& matrix, double scale);
  View adjoint() const;

  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  int64_t parts() const { return parts_; }  // 2 if complex
  // Asks for one of `shares` shares of the lines of a block.
  void fetch(int64_t row, int64_t rows, int64_t col, int64_t cols, int64_t share,
             int64_t shares) const;
  bool by_row() const { return col_step_ < row_step_; }  // how it lies in memory

  // Element (row, col) if rows are contiguous and as T already, to be read as they lie; else null.
  template <typename T>
  const T* direct(int64_t row, int64_t col) const;
  int64_t row_step() const { return row_step_; }

  // Copies rows row .. row + rows and columns col .. col + cols: part p of element (i, k) to
  // out[i * ld + parts * k + p] if by_row, else to out[(parts * k + p) * ld + i]. Adds their
  // squares to `square` unless it is null.
  template <typename T>
  void copy(const Kernels& k, int64_t row, int64_t rows, int64_t col, int64_t cols, bool by_row,
            T* out, int64_t ld, double* square) const;

 private:
  const char* data_;
  DType dtype_;
  int64_t rows_, cols_, row_step_, col_step_;  // steps in real numbers
  int64_t parts_, bytes_;                      // of a real number
  double scale_;
  bool conjugate_ = false;
};

// The largest modulus of a real or imaginary part; NaN or infinity if there is one.
double largest(const Kernels& k, const View& a);

// out = A X. |A|^2 is added to `square` unless it is null.
template <typename T>
void product(const Kernels& k, const View& a, const Block<T>& x, Block<T>& out,
             double* square = nullptr);

// out = X M for the first `width` columns of M.
template <typename T>
void product(const Kernels& k, const Block<T>& x, const Small& m, int64_t width, Block<T>& out);

// X^H X, in double.
template <typename T>
Small gram(const Kernels& k, const Block<T>& x, int64_t parts);

// |A - U S V^H|^2, in double.
template <typename T>
double residual(const Kernels& k, const View& a, const Block<T>& u, const std::vector<double>& s,
                const Block<T>& v);

}  // namespace tb
