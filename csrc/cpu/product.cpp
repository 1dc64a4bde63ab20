#include "cpu/product.h"

#include <algorithm>
#include <utility>

namespace tb {
namespace {

// A panel stays in the second-level cache between its two uses. One that is transposed on the way
// there takes more rows, which are columns of W: fewer would waste the pages it touches.
constexpr int64_t kPanelBytes = 128 << 10, kMaxPanelRows = 16;
constexpr int64_t kTransposedBytes = 512 << 10, kMaxTransposedRows = 64;

// Columns at a time: their part of a panel and of a vector stays in the first-level cache while all
// rows meet it, and all probes.
constexpr int64_t kBlockCols = 256;

constexpr int64_t kSliceElements = 1 << 20;

}  // namespace

Product::Product(const Matrix& m, double scale)
    : kernels_(tb::kernels()),
      data_(static_cast<const char*>(m.data)),
      dtype_(m.dtype),
      rows_(m.rows),
      cols_(m.cols),
      row_stride_(m.row_stride),
      col_stride_(m.col_stride),
      element_(element_bytes(m.dtype)),
      parts_(is_complex(m.dtype) ? 2 : 1),
      scale_(scale),
      conjugate_(false) {
  if (rows_ < cols_) {  // W^H
    std::swap(rows_, cols_);
    std::swap(row_stride_, col_stride_);
    conjugate_ = parts_ == 2;
  }
  rows_ *= parts_;
  cols_ *= parts_;
  columns_ = round_up(cols_, kLanes);
  // An odd number of cache lines: vectors a power of two apart would share a few sets of the cache.
  length_ = columns_ / kLanes % 2 == 0 ? columns_ + kLanes : columns_;
  const bool transposed = col_stride_ != 1;
  const int64_t unit = transposed ? kLanes : kPanelRows;
  const int64_t most = transposed ? kMaxTransposedRows : kMaxPanelRows;
  const int64_t bytes = transposed ? kTransposedBytes : kPanelBytes;
  panel_rows_ = std::clamp(bytes / (4 * columns_) / unit * unit, unit, most);
  slice_rows_ = round_up(std::max<int64_t>(1, kSliceElements / columns_), panel_rows_);
  slices_ = (rows_ + slice_rows_ - 1) / slice_rows_;
}

int64_t Product::scratch(int64_t probes) const {
  if (multiplies_bf16(probes)) return gram_bf16_scratch(cols_, col_stride_ != 1) / 4 + 1;
  return panel_rows_ * (length_ + (kProbes + kRowSums) * (probes / kProbes));
}

// Whether the machine's own bfloat16 products do it: they round x and W x to bfloat16, which moves
// alpha by up to 0.2 %, and give 16 probes for the price of 4.
bool Product::multiplies_bf16(int64_t probes) const {
  return kernels_.gram_bf16 != nullptr && dtype_ == DType::bf16 && scale_ == 1 &&
         probes % kBf16Probes == 0 && (col_stride_ == 1 || row_stride_ == 1);
}

void Product::slice_bf16(int64_t first, int64_t rows, int64_t probes, const float* x, float* y,
                         float* scratch) const {
  const bool wide = col_stride_ != 1;
  const auto* w = reinterpret_cast<const uint16_t*>(place(first));
  for (int64_t p = 0; p < probes; p += kBf16Probes) {
    kernels_.gram_bf16(w, wide ? col_stride_ : row_stride_, wide ? cols_ : rows,
                       wide ? rows : cols_, wide, x + p * length_, length_, y + p * length_,
                       length_, scratch);
  }
}

// Rows first .. first + rows as floats, `ld` apart, padded with zeros to whole kPanelRows and
// kLanes: where they lie, if they lie so.
const float* Product::panel(int64_t first, int64_t rows, float* scratch, int64_t* ld) const {
  if (dtype_ == DType::f32 && scale_ == 1 && col_stride_ == 1 && rows % kPanelRows == 0 &&
      cols_ == columns_) {
    *ld = row_stride_;
    return reinterpret_cast<const float*>(place(first));
  }
  *ld = length_;
  const int64_t padded_rows = round_up(rows, kPanelRows);
  if (col_stride_ != 1 && row_stride_ == 1 && parts_ == 1) {
    if (cols_ != columns_ || rows != padded_rows) {
      std::fill(scratch, scratch + padded_rows * length_, 0.0f);
    }
    kernels_.convert_columns(place(first), dtype_, col_stride_, cols_, rows, scale_, scratch,
                             length_);
    return scratch;
  }
  for (int64_t r = 0; r < rows; r += parts_) {
    float* to = scratch + r * length_;
    kernels_.convert(place(first + r), dtype_, col_stride_, cols_ / parts_, scale_, conjugate_, to,
                     to + length_);
    for (int64_t part = 0; part < parts_; ++part) {
      std::fill(to + part * length_ + cols_, to + (part + 1) * length_, 0.0f);
    }
  }
  std::fill(scratch + rows * length_, scratch + padded_rows * length_, 0.0f);
  return scratch;
}

// The panel that begins at this row.
Ahead Product::ahead(int64_t first, int64_t probes) const {
  if (col_stride_ != 1 || parts_ != 1) return {};
  // At most two lines for each step of the work on the present panel; there is a step for every two
  // of its lines, and for every kProbes probes.
  const int64_t lines = probes > kProbes ? 1 : 2, row = row_stride_ * element_;
  Ahead next;
  next.at = next.column = place(first);
  next.end = next.at + cols_ * element_;
  next.second = (lines - 1) * row;
  next.step = lines * row;
  next.steps = next.left = panel_rows_ / lines;
  return next;
}

void Product::slice(int64_t index, int64_t probes, const float* x, float* y, float* scratch) const {
  const int64_t last = std::min(rows_, (index + 1) * slice_rows_);
  std::fill(y, y + probes * length_, 0.0f);
  if (multiplies_bf16(probes)) {
    const int64_t first = index * slice_rows_;
    return slice_bf16(first, last - first, probes, x, y, scratch);
  }
  const int64_t groups = probes / kProbes;
  float* t = scratch;
  float* sums = t + panel_rows_ * kProbes * groups;
  float* room = sums + panel_rows_ * kRowSums * groups;
  for (int64_t r = index * slice_rows_; r < last; r += panel_rows_) {
    const int64_t rows = std::min(panel_rows_, last - r), padded_rows = round_up(rows, kPanelRows);
    const bool follows = r + 2 * panel_rows_ <= rows_;
    Ahead next = follows ? ahead(r + panel_rows_, probes) : Ahead{};
    int64_t ld;
    const float* w = panel(r, rows, room, &ld);
    std::fill(sums, sums + padded_rows * kRowSums * groups, 0.0f);
    for (int64_t c = 0; c < columns_; c += kBlockCols) {
      const int64_t cols = std::min(kBlockCols, columns_ - c);
      for (int64_t g = 0; g < groups; ++g) {
        kernels_.panel_products(w + c, ld, padded_rows, cols, x + g * kProbes * length_ + c,
                                length_, sums + g * padded_rows * kRowSums, &next);
      }
    }
    for (int64_t g = 0; g < groups; ++g) {
      kernels_.panel_sums(padded_rows, sums + g * padded_rows * kRowSums,
                          t + g * padded_rows * kProbes);
    }
    for (int64_t c = 0; c < columns_; c += kBlockCols) {
      const int64_t cols = std::min(kBlockCols, columns_ - c);
      for (int64_t g = 0; g < groups; ++g) {
        kernels_.panel_accumulate(w + c, ld, padded_rows, cols, t + g * padded_rows * kProbes,
                                  y + g * kProbes * length_ + c, length_, &next);
      }
    }
  }
}

}  // namespace tb
