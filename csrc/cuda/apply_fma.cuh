// One slice of one segment of y = T^T (T x) in float, for weights of any type.
//
//   x of the segment goes to shared memory once
//   for each panel of 8 rows, while the next is on its way to shared memory:
//     t  = panel * x      each thread has the columns thread + 256 i; four rows by 8 probes at a
//                         time are added up over a warp by exchanging halves of what is left
//     t is added up over warps and, where the team is more than one block, over segments
//     y += panel^T * t    y of a thread's columns stays in registers
//   y of the slice goes to memory once
//
// Aligned float32 is copied asynchronously. Anything else is read and converted element by element;
// a complex matrix becomes the real one of twice the size.
#pragma once

#include "cuda/instructions.h"
#include "cuda/panel_stream.cuh"
#include "cuda/team.cuh"

namespace tb::gpu {

constexpr int kFmaPanel = kPanel / 2;  // rows
constexpr int kHalfPanel = 4;          // rows that a thread works on at a time

struct FmaShared {
  float stage[2][kFmaPanel * kSegment];
  float4 x[2][kSegment];  // by column: probes 0 to 3, 4 to 7
  float parts[kWarps][kFmaPanel * kProbes];
  float t[kFmaPanel * kProbes];
};

// Element (row, column) of the tall view, times a power of two.
template <typename Real>
struct Element {
  Real re, im;
};
template <typename Real>
__device__ inline Element<Real> load_element(const SpectralEntry& e, int64_t row, int64_t column,
                                             double scale) {
  const int64_t at = row * e.row_stride + column * e.col_stride;
  const auto narrow = static_cast<float>(scale);
  switch (e.dtype) {
    case DType::f16:
      return {__half2float(load_counted(static_cast<const __half*>(e.data) + at)) * narrow, 0};
    case DType::bf16:
      return {
          __bfloat162float(load_counted(static_cast<const __nv_bfloat16*>(e.data) + at)) * narrow,
          0};
    case DType::f32:
      return {load_counted(static_cast<const float*>(e.data) + at) * narrow, 0};
    case DType::f64:
      return {static_cast<Real>(load_counted(static_cast<const double*>(e.data) + at) * scale), 0};
    case DType::c64: {
      const float2 z = load_counted(static_cast<const float2*>(e.data) + at);
      return {z.x * narrow, z.y * narrow * static_cast<float>(e.conjugate)};
    }
    default: {
      const double2 z = load_counted(static_cast<const double2*>(e.data) + at);
      return {static_cast<Real>(z.x * scale), static_cast<Real>(z.y * scale * e.conjugate)};
    }
  }
}

// A panel in shared memory: rows of it (8, kSegment), or columns (kSegment, 8), whose halves change
// places so that those of eight columns lie in different banks.
template <Path kPath>
struct FmaPanel {
  static constexpr bool kTransposed = kPath == Path::fma_transposed;
  static constexpr int kSize = kFmaPanel * kSegment;

  __device__ static int half_column(int column, int half) {
    return column * kFmaPanel + ((half ^ (column / 4 % 2)) * kHalfPanel);
  }

  // Four rows of a column.
  __device__ static void load(float (&w)[kHalfPanel], const float* panel, int half, int column) {
    if (kTransposed) {
      const float4 four = *reinterpret_cast<const float4*>(panel + half_column(column, half));
      w[0] = four.x, w[1] = four.y, w[2] = four.z, w[3] = four.w;
    } else {
#pragma unroll
      for (int r = 0; r < kHalfPanel; ++r)
        w[r] = panel[(half * kHalfPanel + r) * kSegment + column];
    }
  }

  __device__ static int place(int row, int column) {
    return kTransposed ? half_column(column, row / kHalfPanel) + row % kHalfPanel
                       : row * kSegment + column;
  }

  // Reads a panel in the order in which its elements lie in memory; zeros beyond the matrix.
  __device__ static void convert(float* panel, const SpectralEntry& e, int64_t first_row,
                                 int64_t first_column, double scale) {
    const int size = is_complex(e.dtype) ? 2 : 1;
    const int rows = kFmaPanel / size, columns = kSegment / size;
    const bool down = e.row_stride < e.col_stride;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < rows * columns; i += kThreads) {
      const int r = down ? i % rows : i / columns, c = down ? i / rows : i % columns;
      const int64_t row = first_row / size + r, column = first_column / size + c;
      Element<float> z{0, 0};
      if (row < e.rows && column < e.cols) z = load_element<float>(e, row, column, scale);
      float* to = panel + size * r * kSegment + size * c;
      to[0] = z.re;
      if (size == 2) {
        to[1] = -z.im;
        to[kSegment] = z.im;
        to[kSegment + 1] = z.re;
      }
    }
  }
};

// Adds up kCount numbers of each lane over as many lanes: the l-th of them gets the sum of the
// l-th.
template <int kCount>
__device__ inline float sum_by_lane(float* values) {
  if constexpr (kCount == 1) {
    return values[0];
  } else {
    constexpr int kApart = kCount / 2;
    const bool upper = (lane_index() & kApart) != 0;
#pragma unroll
    for (int k = 0; k < kApart; ++k) {
      const float mine = upper ? values[k + kApart] : values[k];
      const float other = upper ? values[k] : values[k + kApart];
      values[k] = mine + __shfl_xor_sync(kAllLanes, other, kApart);
    }
    return sum_by_lane<kApart>(values);
  }
}

template <Path kPath>
__device__ __noinline__ void apply_fma(const SpectralArgs& a, const SpectralEntry& e,
                                       const SpectralItem& item, int64_t step, double scale,
                                       FmaShared& s) {
  using Panel = FmaPanel<kPath>;
  constexpr int kColumns = kSegment / kThreads;  // of a thread
  const auto thread = static_cast<int>(threadIdx.x);
  const int64_t all_rows = e.rows * (is_complex(e.dtype) ? 2 : 1);
  const int64_t first_row = int64_t{item.slice} * e.slice_rows;
  const int64_t first_column = int64_t{item.segment} * kSegment;
  const int64_t rows = all_rows - first_row < e.slice_rows ? all_rows - first_row : e.slice_rows;
  const int columns =
      e.length - first_column < kSegment ? static_cast<int>(e.length - first_column) : kSegment;
  const auto panels = static_cast<int>((rows + kFmaPanel - 1) / kFmaPanel);
  // Converted weights are scaled as they are read, others when t is there.
  const float later = kPath == Path::convert ? 1 : static_cast<float>(scale);

  PanelStream<float, kFmaPanel, Panel::kTransposed> stream(e, first_row, first_column);
  const auto fetch = [&](int panel) {
    float* to = s.stage[0] + panel % 2 * Panel::kSize;
    if (kPath == Path::convert) {
      Panel::convert(to, e, first_row + panel * kFmaPanel, first_column, scale);
    } else {
      stream.fetch(e, to, static_cast<int>(rows) - panel * kFmaPanel, columns, Panel::place);
    }
  };
  fetch(0);
  cp_async_commit();
  const float* x = a.floats + e.basis + step * kProbes * e.length + first_column;
  for (int i = thread; i < kProbes * kSegment; i += kThreads) {
    const int probe = i / kSegment, column = i % kSegment;
    reinterpret_cast<float*>(&s.x[probe / 4][column])[probe % 4] =
        column < columns ? x[probe * e.length + column] : 0;
  }

  float y[kColumns][kProbes] = {};
  for (int panel = 0; panel < panels; ++panel) {
    const float* now = s.stage[0] + panel % 2 * Panel::kSize;
    if (panel + 1 < panels) fetch(panel + 1);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float t[kLanes] = {};  // (rows, probes)
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const int column = thread + i * kThreads;
        if (column >= columns) continue;
        float w[kHalfPanel];
        Panel::load(w, now, half, column);
        const float4 v0 = s.x[0][column], v1 = s.x[1][column];
        const float v[kProbes] = {v0.x, v0.y, v0.z, v0.w, v1.x, v1.y, v1.z, v1.w};
#pragma unroll
        for (int r = 0; r < kHalfPanel; ++r) {
#pragma unroll
          for (int p = 0; p < kProbes; ++p) t[r * kProbes + p] += w[r] * v[p];
        }
      }
      s.parts[warp_index()][half * kLanes + lane_index()] = sum_by_lane<kLanes>(t);
    }
    __syncthreads();
    if (warp_index() == 0) {
      constexpr int kValues = kFmaPanel / 4;
      float t[kValues];
      sum_of_team<kWarps>(team_of(a, e, item, static_cast<unsigned>(step) * panels + panel),
                          s.parts[0], t);
      const int place = lane_index() / kProbes * kValues * kProbes + lane_index() % kProbes;
      for (int v = 0; v < kValues; ++v) s.t[place + v * kProbes] = t[v] * later;
    }
    __syncthreads();

#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const int column = thread + i * kThreads;
        if (column >= columns) continue;
        float w[kHalfPanel];
        Panel::load(w, now, half, column);
#pragma unroll
        for (int r = 0; r < kHalfPanel; ++r) {
          const float* t = s.t + (half * kHalfPanel + r) * kProbes;
#pragma unroll
          for (int p = 0; p < kProbes; ++p) y[i][p] += w[r] * t[p];
        }
      }
    }
    __syncthreads();
  }
  cp_async_wait<0>();

  float* out = a.floats + e.partials + int64_t{item.slice} * kProbes * e.length + first_column;
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int column = thread + i * kThreads;
    if (column >= columns) continue;
#pragma unroll
    for (int p = 0; p < kProbes; ++p) out[p * e.length + column] = y[i][p];
  }
}

}  // namespace tb::gpu
