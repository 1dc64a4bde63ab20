// Inner products of every layer, in one pass and one launch.
//
//   for each work item, a tile of a matrix (blocks take them in turn)
//     each thread adds up, in double, what its runs of elements give; a run is 16 bytes where the
//     weights lie contiguous and aligned, else one element
//     the block adds up its threads, in order                           | grid barrier
//   for each layer (blocks take them in turn): the sum over its items, in order
//
// Each weight is read once, along rows or, where columns are contiguous, down columns; the other
// operand, which always lies along rows, is then turned round in shared memory. In double nothing
// overflows, and the sums agree with the reference to rounding.
#pragma once

#include <cstring>

#include "cuda/block.h"
#include "cuda/inner_step.h"
#include "cuda/instructions.h"

namespace tb::gpu {

// Element types: how many real numbers one is, and which.
template <typename T>
constexpr int kParts = 1;
template <>
constexpr int kParts<float2> = 2;
template <>
constexpr int kParts<double2> = 2;

__device__ inline double part(__half v, int) { return __half2float(v); }
__device__ inline double part(__nv_bfloat16 v, int) { return __bfloat162float(v); }
__device__ inline double part(float v, int) { return v; }
__device__ inline double part(double v, int) { return v; }
__device__ inline double part(float2 v, int k) { return k == 0 ? v.x : v.y; }
__device__ inline double part(double2 v, int k) { return k == 0 ? v.x : v.y; }

// Numbers of the other operand that lie together.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Pack {
  T values[kCount];
};

// A run of weights.
template <typename T, int kRun>
struct Weights {
  T values[kRun];

  __device__ static Weights load(const T* from) {
    Weights run;
    if constexpr (kRun == 1) {
      run.values[0] = load_counted(from);
    } else {
      const uint4 bytes = load_counted(reinterpret_cast<const uint4*>(from));
      memcpy(&run, &bytes, sizeof(run));
    }
    return run;
  }

  __device__ static Weights zero() {
    Weights run;
    memset(reinterpret_cast<void*>(&run), 0, sizeof(run));
    return run;
  }
};

// What a run adds to the sums of a thread: from a row of W and of G,
struct Dot {
  using Other = int8_t;
  static constexpr int kColumns = kDotColumns;

  template <typename T, int kRun>
  __device__ static void add(const Weights<T, kRun>& w, const Other* g, float scale,
                             double (&sums)[kColumns]) {
    double dot = 0;
#pragma unroll
    for (int i = 0; i < kRun * kParts<T>; ++i) {
      const double v = part(w.values[i / kParts<T>], i % kParts<T>);
      dot += v * g[i];
      sums[1] += v * v;
    }
    sums[0] += dot * scale;
  }
};

// or of W and of W_0.
struct Drift {
  using Other = float;
  static constexpr int kColumns = kDriftColumns;

  template <typename T, int kRun>
  __device__ static void add(const Weights<T, kRun>& w, const Other* before, float,
                             double (&sums)[kColumns]) {
#pragma unroll
    for (int i = 0; i < kRun * kParts<T>; ++i) {
      const double old = before[i];
      const double step = part(w.values[i / kParts<T>], i % kParts<T>) - old;
      sums[0] += step * step;
      sums[1] += step * old;
      sums[2] += old * old;
    }
  }
};

constexpr int kAhead = 2;  // runs that a thread has on their way

// A tile read along its rows, which are tile_cols wide: a power of two of runs.
template <typename Verb, typename T, int kRun>
__device__ void read_rows(const InnerArgs& a, const InnerEntry& e, const InnerItem& item,
                          double (&sums)[Verb::kColumns]) {
  using Other = typename Verb::Other;
  constexpr int kNumbers = kRun * kParts<T>;
  using Numbers = Pack<Other, kNumbers>;
  const int wide = __ffs(e.tile_cols / kRun) - 1;
  const int rows = e.rows - item.row < e.tile_rows ? e.rows - item.row : e.tile_rows;
  const int64_t width = int64_t{e.cols} * kParts<T>;
  const auto* others = static_cast<const Other*>(a.others) + e.other;
  // Only the way in which numbers are read depends on where the matrices before this one end.
  const bool together =
      reinterpret_cast<uintptr_t>(others) % alignof(Numbers) == 0 && width % kNumbers == 0;
  for (int i = static_cast<int>(threadIdx.x); i < rows << wide; i += kAhead * kThreads) {
    Weights<T, kRun> w[kAhead];
    Numbers other[kAhead];
    float scale[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int at = i + k * kThreads, row = item.row + (at >> wide);
      const int column = item.column + (at & ((1 << wide) - 1)) * kRun;
      w[k] = Weights<T, kRun>::zero();
      other[k] = Numbers{};
      scale[k] = 0;
      if (row >= item.row + rows || column >= e.cols) continue;
      const int64_t place = a.kept == nullptr ? row : a.kept[e.first_row + row];
      w[k] = Weights<T, kRun>::load(static_cast<const T*>(e.data) + place * e.row_stride +
                                    column * e.col_stride);
      const Other* from = others + row * width + int64_t{column} * kParts<T>;
      if (together) {
        other[k] = *reinterpret_cast<const Numbers*>(from);
      } else {
#pragma unroll
        for (int n = 0; n < kNumbers; ++n) other[k].values[n] = from[n];
      }
      if (a.scales != nullptr) scale[k] = a.scales[e.first_row + row];
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) Verb::add(w[k], other[k].values, scale[k], sums);
  }
}

constexpr int kStrip = 64;          // rows
constexpr int kBand = 64;           // real numbers of a row
constexpr int kPitch = kStrip + 8;  // keeps runs aligned, and those of a column in other banks

// A tile of W read down its columns, strip by strip; G is turned round in shared memory.
template <typename T, int kRun>
__device__ void read_columns(const InnerArgs& a, const InnerEntry& e, const InnerItem& item,
                             double (&sums)[kDotColumns], int8_t* turned) {
  constexpr int kColumns = kBand / kParts<T>;           // of a band
  constexpr int kAbreast = kThreads / (kStrip / kRun);  // columns that the block reads at once
  constexpr int kReads = (kColumns + kAbreast - 1) / kAbreast;
  const auto thread = static_cast<int>(threadIdx.x);
  const int run = thread % (kStrip / kRun) * kRun, first = thread / (kStrip / kRun);
  const int last_row = e.rows - item.row < e.tile_rows ? e.rows : item.row + e.tile_rows;
  const int last_column = e.cols - item.column < e.tile_cols ? e.cols : item.column + e.tile_cols;
  const int64_t width = int64_t{e.cols} * kParts<T>;
  const auto* g = static_cast<const int8_t*>(a.others) + e.other;
  for (int top = item.row; top < last_row; top += kStrip) {
    const bool inside = top + run < last_row;
    double dots[kRun] = {};
    for (int left = item.column; left < last_column; left += kColumns) {
      __syncthreads();
#pragma unroll 4
      for (int i = thread; i < kStrip * kBand; i += kThreads) {
        const int row = i / kBand, number = i % kBand;
        const bool there = top + row < last_row && left + number / kParts<T> < last_column;
        turned[number * kPitch + row] =
            there ? g[(top + row) * width + int64_t{left} * kParts<T> + number] : 0;
      }
      __syncthreads();
#pragma unroll 2
      for (int k = 0; k < kReads; ++k) {
        const int column = first + k * kAbreast;
        if (!inside || column >= kColumns || left + column >= last_column) continue;
        const auto w =
            Weights<T, kRun>::load(static_cast<const T*>(e.data) + (top + run) * e.row_stride +
                                   (left + column) * e.col_stride);
#pragma unroll
        for (int p = 0; p < kParts<T>; ++p) {
          const auto numbers = *reinterpret_cast<const Pack<int8_t, kRun>*>(
              turned + (column * kParts<T> + p) * kPitch + run);
#pragma unroll
          for (int v = 0; v < kRun; ++v) {
            const double value = part(w.values[v], p);
            dots[v] += value * numbers.values[v];
            sums[1] += value * value;
          }
        }
      }
    }
    for (int v = 0; v < kRun && inside; ++v) {
      sums[0] += dots[v] * a.scales[e.first_row + top + run + v];
    }
  }
}

template <typename Verb, typename T>
__device__ void read_tile(const InnerArgs& a, const InnerEntry& e, const InnerItem& item,
                          double (&sums)[Verb::kColumns], int8_t* turned) {
  constexpr int kRun = static_cast<int>(16 / sizeof(T));
  if constexpr (Verb::kColumns == kDotColumns) {
    if (e.down != 0 && e.run == kRun) return read_columns<T, kRun>(a, e, item, sums, turned);
    if (e.down != 0) return read_columns<T, 1>(a, e, item, sums, turned);
  }
  if (e.run == kRun) return read_rows<Verb, T, kRun>(a, e, item, sums);
  read_rows<Verb, T, 1>(a, e, item, sums);
}

template <typename Verb>
__device__ void read_item(const InnerArgs& a, const InnerItem& item,
                          double (&sums)[Verb::kColumns]) {
  TB_SHARED(uint64_t, bytes, [kBand * kPitch / 8]);
  auto* turned = reinterpret_cast<int8_t*>(bytes);
  const InnerEntry& e = a.entries[item.matrix];
  switch (e.dtype) {
    case DType::f16:
      return read_tile<Verb, __half>(a, e, item, sums, turned);
    case DType::bf16:
      return read_tile<Verb, __nv_bfloat16>(a, e, item, sums, turned);
    case DType::f32:
      return read_tile<Verb, float>(a, e, item, sums, turned);
    case DType::f64:
      return read_tile<Verb, double>(a, e, item, sums, turned);
    case DType::c64:
      return read_tile<Verb, float2>(a, e, item, sums, turned);
    case DType::c128:
      return read_tile<Verb, double2>(a, e, item, sums, turned);
  }
}

// Writes the sums over the block's threads to a row.
template <int kColumns>
__device__ void write_sums(const double (&sums)[kColumns], double* row) {
  for (int k = 0; k < kColumns; ++k) {
    const double sum = block_sum(sums[k]);
    if (threadIdx.x == 0) row[k] = sum;
  }
}

// The kernels.
template <typename Verb>
__device__ void inner_step(const InnerArgs& a) {
  constexpr int kColumns = Verb::kColumns;
  for (int64_t i = blockIdx.x; i < a.item_count; i += gridDim.x) {
    double sums[kColumns] = {};
    read_item<Verb>(a, a.items[i], sums);
    write_sums(sums, a.sums + i * kColumns);
  }
  grid_barrier();
  for (int64_t layer = blockIdx.x; layer < a.layers; layer += gridDim.x) {
    double sums[kColumns] = {};
    for (int64_t i = a.first_item[layer] + threadIdx.x; i < a.first_item[layer + 1];
         i += kThreads) {
      for (int k = 0; k < kColumns; ++k) sums[k] += __ldcg(a.sums + i * kColumns + k);
    }
    write_sums(sums, a.results + layer * kColumns);
  }
}

__global__ void __launch_bounds__(kThreads, 2) dot_step(const __grid_constant__ InnerArgs a) {
  inner_step<Dot>(a);
}

__global__ void __launch_bounds__(kThreads, 3) drift_step(const __grid_constant__ InnerArgs a) {
  inner_step<Drift>(a);
}

}  // namespace tb::gpu
