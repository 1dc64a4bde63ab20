// A ragged batch: many matrices of many shapes and types, described once and never copied.
#pragma once

#include <algorithm>
#include <cstdint>

#include "portable.h"

namespace tb {

// The numbers are those of tbfast/batch.py.
enum class DType : int64_t { f16 = 0, bf16 = 1, f32 = 2, f64 = 3, c64 = 4, c128 = 5 };

TB_DEVICE inline bool is_complex(DType t) { return t == DType::c64 || t == DType::c128; }

inline int64_t element_bytes(DType t) {
  constexpr int64_t bytes[] = {2, 2, 4, 8, 8, 16};
  return bytes[static_cast<int64_t>(t)];
}

// One matrix W where it lies. Whoever made it keeps the memory alive.
struct Matrix {
  const void* data;
  int64_t rows, cols;
  int64_t row_stride, col_stride;  // in elements
  DType dtype;
  int64_t layer;  // which layer's spectrum it is part of
  int64_t index;  // its place among the matrices of that layer

  // Number of eigenvalues of W^H W that count: the shorter side.
  int64_t count() const { return std::min(rows, cols); }

  // Length of the real vectors that Lanczos runs on. A complex W acts on real vectors of twice the
  // length, (re, im) interleaved: its eigenvalues then come in pairs and their distribution stays.
  int64_t length() const { return count() * (is_complex(dtype) ? 2 : 1); }
};

}  // namespace tb
