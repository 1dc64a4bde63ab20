// The verbs `dot` and `drift`: panels of rows of all layers, each read once, as it lies.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "inner.h"

namespace tb {
namespace {

constexpr int64_t kPanelElements = 1 << 16;  // a task: long beside its start, short beside a layer
constexpr int64_t kTileRows = 32;            // a cache line of the narrowest type
constexpr int64_t kTileCols = 128;
constexpr int64_t kRun = 1024;     // elements widened at a time
constexpr int64_t kMaxBytes = 16;  // of an element

const char* place(const Matrix& m, int64_t row, int64_t col) {
  return static_cast<const char*>(m.data) +
         (row * m.row_stride + col * m.col_stride) * element_bytes(m.dtype);
}

// Copies a tile of a matrix to `out`, rows of `cols` elements, along the smaller of its strides.
template <int64_t kBytes>
void copy_tile(const Matrix& m, int64_t row, int64_t rows, int64_t col, int64_t cols, char* out) {
  const auto copy = [&](int64_t r, int64_t c) {
    std::memcpy(out + (r * cols + c) * kBytes, place(m, row + r, col + c), kBytes);
  };
  if (m.row_stride < m.col_stride) {
    for (int64_t c = 0; c < cols; ++c) {
      for (int64_t r = 0; r < rows; ++r) copy(r, c);
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) copy(r, c);
    }
  }
}

// Reads runs of elements of a row as contiguous floats or doubles.
class Reader {
 public:
  // Calls run(values, row, first, n) until all elements of `rows` rows from `row` on were seen;
  // values: float or double, n of them, the row's from `first` on, complex ones as two.
  template <typename Run>
  void read(const Matrix& m, int64_t row, int64_t rows, const Run& run) {
    if (m.col_stride == 1) {
      for (int64_t r = row; r < row + rows; ++r) pass(m, place(m, r, 0), r, 0, m.cols, run);
      return;
    }
    for (int64_t top = row; top < row + rows; top += kTileRows) {
      const int64_t height = std::min(kTileRows, row + rows - top);
      for (int64_t left = 0; left < m.cols; left += kTileCols) {
        const int64_t cols = std::min(kTileCols, m.cols - left);
        fill(m, top, height, left, cols);
        for (int64_t r = 0; r < height; ++r) {
          pass(m, tile_ + r * cols * element_bytes(m.dtype), top + r, left, cols, run);
        }
      }
    }
  }

 private:
  void fill(const Matrix& m, int64_t row, int64_t rows, int64_t col, int64_t cols) {
    switch (element_bytes(m.dtype)) {
      case 2:
        return copy_tile<2>(m, row, rows, col, cols, tile_);
      case 4:
        return copy_tile<4>(m, row, rows, col, cols, tile_);
      case 8:
        return copy_tile<8>(m, row, rows, col, cols, tile_);
      default:
        return copy_tile<16>(m, row, rows, col, cols, tile_);
    }
  }

  template <typename Run>
  void pass(const Matrix& m, const char* from, int64_t row, int64_t first, int64_t n,
            const Run& run) {
    switch (m.dtype) {
      case DType::f16:
      case DType::bf16:
        for (int64_t i = 0; i < n; i += kRun) {
          const int64_t part = std::min(kRun, n - i);
          kernels_.convert(from + 2 * i, m.dtype, 1, part, 1, false, widened_, nullptr);
          run(widened_, row, first + i, part);
        }
        return;
      case DType::f32:
        return run(reinterpret_cast<const float*>(from), row, first, n);
      case DType::f64:
        return run(reinterpret_cast<const double*>(from), row, first, n);
      case DType::c64:
        return run(reinterpret_cast<const float*>(from), row, 2 * first, 2 * n);
      case DType::c128:
        return run(reinterpret_cast<const double*>(from), row, 2 * first, 2 * n);
    }
  }

  const Kernels& kernels_ = kernels();
  float widened_[kRun];
  alignas(16) char tile_[kTileRows * kTileCols * kMaxBytes];
};

// Rows first .. last of matrices begin .. end, all of one layer and of one shape.
struct Panel {
  size_t begin, end;
  int64_t first, last;
};

// Cut by shape alone. Matrices that lie interleaved, as the slices of a convolution do, are read
// together, so that what one leaves in the cache serves the next.
std::vector<Panel> panels(const std::vector<Matrix>& matrices) {
  std::vector<Panel> cut;
  for (size_t begin = 0, end; begin < matrices.size(); begin = end) {
    const Matrix& m = matrices[begin];
    end = begin + 1;
    if (m.col_stride != 1) {
      while (end < matrices.size() && matrices[end].layer == m.layer &&
             matrices[end].rows == m.rows) {
        ++end;
      }
    }
    const int64_t elements = width(m) * static_cast<int64_t>(end - begin);
    const int64_t step = std::max(kTileRows, kPanelElements / elements);
    for (int64_t row = 0; row < m.rows; row += step) {
      cut.push_back({begin, end, row, std::min(m.rows, row + step)});
    }
  }
  return cut;
}

// Where the rows and the elements of each matrix begin when all stand end to end.
struct Offsets {
  std::vector<int64_t> row, element;

  explicit Offsets(const std::vector<Matrix>& matrices) : row{0}, element{0} {
    for (const Matrix& m : matrices) {
      row.push_back(row.back() + m.rows);
      element.push_back(element.back() + m.rows * width(m));
    }
  }
};

}  // namespace

std::vector<InnerProduct> dot(const std::vector<Matrix>& matrices, int64_t layers,
                              const int8_t* values, const float* scales, int threads) {
  const Offsets offsets(matrices);
  const std::vector<Panel> cut = panels(matrices);
  std::vector<InnerProduct> sums(cut.size());
  const Kernels& k = kernels();
  parallel_for(static_cast<int64_t>(cut.size()), threads, [&](int64_t task) {
    const Panel& panel = cut[static_cast<size_t>(task)];
    InnerProduct sum{};
    Reader reader;
    for (int64_t row = panel.first; row < panel.last; row += kTileRows) {
      const int64_t rows = std::min(kTileRows, panel.last - row);
      for (size_t i = panel.begin; i < panel.end; ++i) {
        const Matrix& m = matrices[i];
        const int8_t* g = values + offsets.element[i];
        const float* scale = scales + offsets.row[i];
        reader.read(m, row, rows, [&](const auto* w, int64_t r, int64_t first, int64_t n) {
          double part = 0;
          const int8_t* from = g + r * width(m) + first;
          if constexpr (sizeof(*w) == sizeof(float)) {
            k.inner_f32(w, from, n, &part, &sum.square);
          } else {
            k.inner_f64(w, from, n, &part, &sum.square);
          }
          sum.dot += part * scale[r];
        });
      }
    }
    sums[static_cast<size_t>(task)] = sum;
  });
  std::vector<InnerProduct> out(static_cast<size_t>(layers));
  for (size_t i = 0; i < cut.size(); ++i) {
    InnerProduct& layer = out[static_cast<size_t>(matrices[cut[i].begin].layer)];
    layer.dot += sums[i].dot;
    layer.square += sums[i].square;
  }
  return out;
}

std::vector<Movement> drift(const std::vector<Matrix>& matrices, int64_t layers,
                            const int64_t* rows, int64_t count, const float* values, int threads) {
  const Offsets offsets(matrices);
  std::vector<size_t> owner(static_cast<size_t>(count));       // matrix of each row
  std::vector<int64_t> start(static_cast<size_t>(count) + 1);  // of its values
  std::vector<size_t> cut{0};                                  // rows at which tasks begin
  for (size_t i = 0, matrix = 0; i < owner.size(); ++i) {
    while (rows[i] >= offsets.row[matrix + 1]) ++matrix;
    owner[i] = matrix;
    start[i + 1] = start[i] + width(matrices[matrix]);
    const bool same_layer = matrices[owner[cut.back()]].layer == matrices[matrix].layer;
    if (!same_layer || start[i] - start[cut.back()] >= kPanelElements) cut.push_back(i);
  }
  if (count > 0) cut.push_back(owner.size());
  const auto tasks = static_cast<int64_t>(cut.size()) - 1;
  std::vector<Movement> sums(static_cast<size_t>(tasks));
  const Kernels& k = kernels();
  parallel_for(tasks, threads, [&](int64_t task) {
    double sum[3] = {};
    Reader reader;
    for (size_t i = cut[static_cast<size_t>(task)]; i < cut[static_cast<size_t>(task) + 1]; ++i) {
      const float* kept = values + start[i];
      const int64_t row = rows[i] - offsets.row[owner[i]];
      reader.read(matrices[owner[i]], row, 1,
                  [&](const auto* w, int64_t, int64_t first, int64_t n) {
                    if constexpr (sizeof(*w) == sizeof(float)) {
                      k.movement_f32(w, kept + first, n, sum);
                    } else {
                      k.movement_f64(w, kept + first, n, sum);
                    }
                  });
    }
    sums[static_cast<size_t>(task)] = {sum[0], sum[1], sum[2]};
  });
  std::vector<Movement> out(static_cast<size_t>(layers));
  for (size_t i = 0; i < sums.size(); ++i) {
    Movement& layer = out[static_cast<size_t>(matrices[owner[cut[i]]].layer)];
    layer.moved += sums[i].moved;
    layer.along += sums[i].along;
    layer.size += sums[i].size;
  }
  return out;
}

}  // namespace tb
