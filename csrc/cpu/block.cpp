#include "cpu/block.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

namespace tb {
namespace {

// A block of a matrix that is multiplied at a time: rows a multiple of every tile's; it and the
// part of X it meets stay in the second-level cache.
constexpr int64_t kRows = 120;
constexpr int64_t kDepth = 256;
constexpr int64_t kLongest = std::max(kRows, kDepth);

// Rows of a Gram matrix that are computed at a time, from their diagonal on; whole cache lines.
constexpr int64_t kGramRows = 24;

constexpr int64_t kShare = 20;      // rows multiplied between requests for the next block
constexpr int64_t kLinesAhead = 4;  // of a block that are asked for before they are copied
constexpr int64_t kCacheLine = 64;  // bytes

void prefetch(const char* begin, int64_t bytes) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(begin + i, 0, 2);
#else
  (void)begin, (void)bytes;
#endif
}

void multiply_add(const Kernels& k, const float* a, int64_t row_step, int64_t depth_step,
                  int64_t rows, int64_t depth, const float* x, float* c, int64_t width,
                  int64_t ld) {
  k.skinny_product_f32(a, row_step, depth_step, rows, depth, x, c, width, ld);
}

void multiply_add(const Kernels& k, const double* a, int64_t row_step, int64_t depth_step,
                  int64_t rows, int64_t depth, const double* x, double* c, int64_t width,
                  int64_t ld) {
  k.skinny_product_f64(a, row_step, depth_step, rows, depth, x, c, width, ld);
}

double square_sum(const Kernels& k, const float* x, int64_t n) { return k.square_sum_f32(x, n); }
double square_sum(const Kernels& k, const double* x, int64_t n) { return k.square_sum_f64(x, n); }

template <typename From, typename To>
void copy_line(const From* from, int64_t step, int64_t n, To factor, To* to, int64_t to_step) {
  if (step == 1 && to_step == 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(from[i]) * factor;
  } else {
    for (int64_t i = 0; i < n; ++i) to[i * to_step] = static_cast<To>(from[i * step]) * factor;
  }
}

// (re, im, ...) -> (-im, re, ...): the next row of the real form of a complex matrix.
template <typename T>
void times_i(const T* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; i += 2) {
    to[i] = -from[i + 1];
    to[i + 1] = from[i];
  }
}

}  // namespace

template <typename T>
void Block<T>::resize(int64_t rows, int64_t width) {
  constexpr int64_t kLine = kCacheLine / sizeof(T);
  rows_ = rows;
  width_ = width;
  ld_ = (width + kLine - 1) / kLine * kLine;
  data_ = memory_.reserve(rows * ld_);
  std::fill(data_, data_ + rows * ld_, T(0));
}

View::View(const Matrix& matrix, double scale)
    : data_(static_cast<const char*>(matrix.data)),
      dtype_(matrix.dtype),
      rows_(matrix.rows),
      cols_(matrix.cols),
      row_step_(matrix.row_stride),
      col_step_(matrix.col_stride),
      parts_(is_complex(matrix.dtype) ? 2 : 1),
      scale_(scale) {
  constexpr int64_t kBytes[] = {2, 2, 4, 8, 4, 8};
  bytes_ = kBytes[static_cast<int64_t>(dtype_)];
  row_step_ *= parts_;
  col_step_ *= parts_;
}

View View::adjoint() const {
  View out = *this;
  std::swap(out.rows_, out.cols_);
  std::swap(out.row_step_, out.col_step_);
  out.conjugate_ = !conjugate_;
  return out;
}

template <typename T>
const T* View::direct(int64_t row, int64_t col) const {
  const DType own = std::is_same_v<T, float> ? DType::f32 : DType::f64;
  if (dtype_ != own || col_step_ != 1 || scale_ != 1) return nullptr;
  return reinterpret_cast<const T*>(data_) + row * row_step_ + col;
}

void View::fetch(int64_t row, int64_t rows, int64_t col, int64_t cols, int64_t share,
                 int64_t shares) const {
  const int64_t lines = by_row() ? rows : cols, length = by_row() ? cols : rows;
  const int64_t step = by_row() ? col_step_ : row_step_;
  const int64_t line_step = by_row() ? row_step_ : col_step_;
  if (step != parts_) return;
  const char* begin = data_ + (row * row_step_ + col * col_step_) * bytes_;
  for (int64_t i = lines * share / shares; i < lines * (share + 1) / shares; ++i) {
    prefetch(begin + i * line_step * bytes_, length * step * bytes_);
  }
}

template <typename T>
void View::copy(const Kernels& k, int64_t row, int64_t rows, int64_t col, int64_t cols, bool by_row,
                T* out, int64_t ld, double* square) const {
  const int64_t lines = by_row ? rows : cols, length = by_row ? cols : rows;
  const int64_t step = by_row ? col_step_ : row_step_, line_step = by_row ? row_step_ : col_step_;
  const int64_t to_step = by_row ? parts_ : 1, to_part = by_row ? 1 : ld;
  const int64_t to_line = by_row ? ld : parts_ * ld;
  const char* begin = data_ + (row * row_step_ + col * col_step_) * bytes_;
  const auto scale = static_cast<T>(scale_);
  float widened[kLongest];
  for (int64_t i = 0; i < lines; ++i) {
    const char* from = begin + i * line_step * bytes_;
    T* to = out + i * to_line;
    if (step == parts_ && i + kLinesAhead < lines) {
      prefetch(from + kLinesAhead * line_step * bytes_, length * step * bytes_);
    }
    if (bytes_ == 2) {
      k.convert(from, dtype_, step, length, 1, false, widened, nullptr);
      copy_line(widened, 1, length, scale, to, 1);
    } else if (std::is_same_v<T, float> && dtype_ == DType::f32) {
      k.convert(from, dtype_, step, length, scale_, false, reinterpret_cast<float*>(to), nullptr);
    } else {
      for (int64_t part = 0; part < parts_; ++part) {
        const T factor = part == 1 && conjugate_ ? -scale : scale;
        if (bytes_ == 4) {
          const auto* line = reinterpret_cast<const float*>(from) + part;
          copy_line(line, step, length, factor, to + part * to_part, to_step);
        } else {
          const auto* line = reinterpret_cast<const double*>(from) + part;
          copy_line(line, step, length, factor, to + part * to_part, to_step);
        }
      }
    }
    if (square == nullptr) continue;
    for (int64_t part = 0; part < (by_row ? 1 : parts_); ++part) {
      *square += square_sum(k, to + part * ld, by_row ? parts_ * length : length);
    }
  }
}

double largest(const Kernels& k, const View& a) {
  double line[2 * kDepth], top = 0;
  for (int64_t row = 0; row < a.rows(); ++row) {
    for (int64_t col = 0; col < a.cols(); col += kDepth) {
      const int64_t cols = std::min(kDepth, a.cols() - col);
      a.copy(k, row, 1, col, cols, true, line, 0, nullptr);
      for (int64_t i = 0; i < a.parts() * cols; ++i) {
        if (!std::isfinite(line[i])) return line[i];
        top = std::max(top, std::abs(line[i]));
      }
    }
  }
  return top;
}

template <typename T>
void product(const Kernels& k, const View& a, const Block<T>& x, Block<T>& out, double* square) {
  out.resize(a.rows(), x.width());
  const int64_t parts = a.parts(), deepest = kDepth / parts, ld = out.ld();
  Buffer<T> copied, expanded;
  T* panel = copied.reserve(kRows * kDepth);
  T* real_form = parts == 2 ? expanded.reserve(kDepth * ld) : nullptr;
  for (int64_t col = 0; col < a.cols(); col += deepest) {
    const int64_t cols = std::min(deepest, a.cols() - col);
    const T* right = x.row(col);
    if (parts == 2) {
      for (int64_t i = 0; i < cols; ++i) {
        std::copy(x.row(col + i), x.row(col + i) + ld, real_form + 2 * i * ld);
        times_i(x.row(col + i), ld, real_form + (2 * i + 1) * ld);
      }
      right = real_form;
    }
    for (int64_t row = 0; row < a.rows(); row += kRows) {
      const int64_t rows = std::min(kRows, a.rows() - row);
      const T* left = a.template direct<T>(row, col);
      int64_t row_step = a.row_step(), depth_step = 1;
      if (left != nullptr) {
        for (int64_t i = 0; square != nullptr && i < rows; ++i) {
          *square += square_sum(k, left + i * row_step, cols);
        }
      } else {
        const bool by_row = a.by_row();
        a.copy(k, row, rows, col, cols, by_row, panel, by_row ? kDepth : kRows, square);
        left = panel;
        row_step = by_row ? kDepth : 1;
        depth_step = by_row ? 1 : kRows;
      }
      // The next block comes in while this one is multiplied.
      const int64_t ahead = std::min(kRows, a.rows() - row - rows), shares = kRows / kShare;
      for (int64_t part = 0; part < rows; part += kShare) {
        if (ahead > 0) a.fetch(row + rows, ahead, col, cols, part / kShare, shares);
        multiply_add(k, left + part * row_step, row_step, depth_step, std::min(kShare, rows - part),
                     parts * cols, right, out.row(row + part), ld, ld);
      }
    }
  }
}

template <typename T>
void product(const Kernels& k, const Block<T>& x, const Small& m, int64_t width, Block<T>& out) {
  out.resize(x.rows(), width);
  Block<T> right;
  right.resize(m.order(), width);
  for (int64_t i = 0; i < m.order(); ++i) {
    for (int64_t j = 0; j < width; ++j) right.row(i)[j] = static_cast<T>(m.row(i)[j]);
  }
  for (int64_t row = 0; row < x.rows(); row += kRows) {
    const int64_t rows = std::min(kRows, x.rows() - row);
    for (int64_t depth = 0; depth < m.order(); depth += kDepth) {
      multiply_add(k, x.row(row) + depth, x.ld(), 1, rows, std::min(kDepth, m.order() - depth),
                   right.row(depth), out.row(row), out.ld(), out.ld());
    }
  }
}

template <typename T>
Small gram(const Kernels& k, const Block<T>& x, int64_t parts) {
  const int64_t n = x.width();
  Small out(n, parts);
  const int64_t ld = out.ld();
  Buffer<double> memory;
  double* panel = memory.reserve(kRows * ld);
  std::fill(panel, panel + kRows * ld, 0.0);
  for (int64_t first = 0; first < x.rows(); first += kRows) {
    const int64_t depth = std::min(kRows, x.rows() - first);
    for (int64_t i = 0; i < depth; ++i) {
      std::copy(x.row(first + i), x.row(first + i) + n, panel + i * ld);
    }
    for (int64_t i = 0; i < n; i += kGramRows) {
      multiply_add(k, panel + i, 1, ld, std::min(kGramRows, n - i), depth, panel + i,
                   out.row(i) + i, ld - i, ld);
    }
  }
  if (parts == 1) return out;
  // So far the real columns were multiplied with one another, and two columns make a complex one.
  for (int64_t i = 0; i < n; i += 2) {
    for (int64_t j = i; j < n; j += 2) {
      const double re = out.row(i)[j] + out.row(i + 1)[j + 1];
      const double im = out.row(i)[j + 1] - out.row(i + 1)[j];
      out.row(i)[j] = re;
      out.row(i)[j + 1] = im;
    }
    out.complete(i);
  }
  return out;
}

template <typename T>
double residual(const Kernels& k, const View& a, const Block<T>& u, const std::vector<double>& s,
                const Block<T>& v) {
  const int64_t parts = a.parts(), depth = u.width(), wide = kDepth / parts;
  Buffer<double> rows_of_u, rows_of_vh, rows_of_a;
  double* left = rows_of_u.reserve(kRows * depth);
  double* right = rows_of_vh.reserve(depth * kDepth);
  double* difference = rows_of_a.reserve(kRows * kDepth);
  double square = 0;
  for (int64_t col = 0; col < a.cols(); col += wide) {
    const int64_t cols = std::min(wide, a.cols() - col);
    std::fill(right, right + depth * kDepth, 0.0);
    for (int64_t j = 0; j < cols; ++j) {
      for (int64_t p = 0; p < depth; p += parts) {
        const T* element = v.row(col + j) + p;
        double* to = right + p * kDepth + parts * j;
        to[0] = -element[0];
        if (parts == 2) to[1] = element[1];
      }
    }
    if (parts == 2) {
      for (int64_t p = 0; p < depth; p += 2) {
        times_i(right + p * kDepth, kDepth, right + (p + 1) * kDepth);
      }
    }
    for (int64_t row = 0; row < a.rows(); row += kRows) {
      const int64_t rows = std::min(kRows, a.rows() - row);
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t p = 0; p < depth; ++p) left[i * depth + p] = u.row(row + i)[p] * s[p / parts];
      }
      std::fill(difference, difference + rows * kDepth, 0.0);
      a.copy(k, row, rows, col, cols, true, difference, kDepth, nullptr);
      multiply_add(k, left, depth, 1, rows, depth, right, difference, kDepth, kDepth);
      square += k.square_sum_f64(difference, rows * kDepth);
    }
  }
  return square;
}

template class Block<float>;
template class Block<double>;
template void product(const Kernels&, const View&, const Block<float>&, Block<float>&, double*);
template void product(const Kernels&, const View&, const Block<double>&, Block<double>&, double*);
template void product(const Kernels&, const Block<float>&, const Small&, int64_t, Block<float>&);
template void product(const Kernels&, const Block<double>&, const Small&, int64_t, Block<double>&);
template Small gram(const Kernels&, const Block<float>&, int64_t);
template Small gram(const Kernels&, const Block<double>&, int64_t);
template double residual(const Kernels&, const View&, const Block<float>&,
                         const std::vector<double>&, const Block<float>&);
template double residual(const Kernels&, const View&, const Block<double>&,
                         const std::vector<double>&, const Block<double>&);

}  // namespace tb
