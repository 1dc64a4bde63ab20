// One slice of one segment of y = T^T (T x) on the tensor cores, for weights of two bytes.
//
//   x of the segment goes to shared memory once, as high + low parts of the weights' type
//   for each panel of 16 rows, while the next is on its way to shared memory:
//     t  = panel * x             mma m16n8k16: 16 rows, 8 probes, 16 columns at a time; each warp
//                                has the columns 16 (warp + 8 i) .. + 15
//     t is added up over warps and, where the team is more than one block, over segments
//     y += panel^T * t           mma m16n8k16: 16 columns, 8 probes, 16 rows; y stays in registers
//   y of the slice goes to memory once
//
// Each weight is read from memory once and from shared memory twice. High and low parts keep 16
// bits of x and t (22 for f16, whose range takes scaling: x and t of a panel by a power of two for
// each probe).
#pragma once

#include "cuda/instructions.h"
#include "cuda/panel_stream.cuh"
#include "cuda/team.cuh"

namespace tb::gpu {

template <typename T>
struct Half;  // the arithmetic of a type of two bytes

template <>
struct Half<__nv_bfloat16> {
  static constexpr bool kNarrow = false;
  static __device__ __nv_bfloat16 of(float v) { return __float2bfloat16(v); }
  static __device__ float value(__nv_bfloat16 v) { return __bfloat162float(v); }
};

template <>
struct Half<__half> {
  static constexpr bool kNarrow = true;
  static __device__ __half of(float v) { return __float2half(v); }
  static __device__ float value(__half v) { return __half2float(v); }
};

// The exponent of the power of two that numbers up to `top` are divided by to be below 2^15.
__device__ inline int exponent_for(float top) {
  return top > 0 && top < 1e38f ? ilogbf(top) - 14 : 0;
}

// Places in shared memory, in numbers of two bytes. What ldmatrix reads are groups of eight, eight
// rows at a time; groups change places so that those eight lie in different banks.

// Of rows of kSegment numbers: x, and a panel as it lies in a matrix with contiguous rows.
__device__ inline int place_in_rows(int row, int column) {
  return row * kSegment + ((column / 8 ^ (row & 7)) * 8) + column % 8;
}

// Of columns of kPanel numbers: a panel of a matrix with contiguous columns.
__device__ inline int place_in_columns(int row, int column) {
  return column * kPanel + ((row / 8 ^ (column / 4 % 2)) * 8) + row % 8;
}

// Columns that lie kWarps blocks of 16 apart have the same group change.
constexpr int kNextInRows = 16 * kWarps, kNextInColumns = kNextInRows * kPanel;

template <typename T>
struct MmaShared {
  static constexpr int kStage = kPanel * kSegment;  // numbers
  T stage[2][kStage];
  T x[2][kProbes * kSegment];  // high, low
  float parts[kWarps / 2][kPanel * kProbes];
  T t[2][kProbes * kPanel];  // high, low
  float unit[2][kProbes];    // powers of two that x and t were divided by
};

template <typename T, bool kTransposed>
struct MmaPanel {
  static constexpr int kNext = kTransposed ? kNextInColumns : kNextInRows;

  __device__ static int place(int row, int column) {
    return kTransposed ? place_in_columns(row, column) : place_in_rows(row, column);
  }

  // Where this lane's row lies of the first block of 16 columns of its warp, for 16 rows by 16
  // columns as the left operand, and for 16 columns by 16 rows.
  __device__ static int left_place() {
    const int matrix = lane_index() / 8, row = lane_index() % 8, column = warp_index() * 16;
    return kTransposed ? place(matrix % 2 * 8, column + matrix / 2 * 8 + row)
                       : place(matrix % 2 * 8 + row, column + matrix / 2 * 8);
  }
  __device__ static int left_transposed_place() {
    const int matrix = lane_index() / 8, row = lane_index() % 8, column = warp_index() * 16;
    return kTransposed ? place(matrix / 2 * 8, column + matrix % 2 * 8 + row)
                       : place(matrix / 2 * 8 + row, column + matrix % 2 * 8);
  }

  __device__ static void load(uint32_t (&left)[4], const T* from) {
    kTransposed ? ldmatrix_x4_trans(left, from) : ldmatrix_x4(left, from);
  }
  __device__ static void load_transposed(uint32_t (&left)[4], const T* from) {
    kTransposed ? ldmatrix_x4(left, from) : ldmatrix_x4_trans(left, from);
  }
};

template <typename T>
__device__ inline void store_parts(float value, T& high, T& low) {
  high = Half<T>::of(value);
  low = Half<T>::of(value - Half<T>::value(high));
}

// x of a segment to shared memory, zeros beyond its end. A warp has one probe.
//   x: (kProbes, length) from the segment's first column on
template <typename T>
__device__ inline void share_x(MmaShared<T>& s, const float* x, int64_t length, int columns) {
  static_assert(kProbes == kWarps);
  const int probe = warp_index();
  x += probe * length;
  int exponent = 0;
  if (Half<T>::kNarrow) {
    float top = 0;
    for (int c = lane_index(); c < columns; c += kLanes) top = fmaxf(top, fabsf(x[c]));
    exponent = exponent_for(warp_max(top));
    if (lane_index() == 0) s.unit[0][probe] = ldexpf(1, exponent);
  }
  for (int c = lane_index(); c < kSegment; c += kLanes) {
    const int place = place_in_rows(probe, c);
    store_parts(c < columns ? ldexpf(x[c], -exponent) : 0, s.x[0][place], s.x[1][place]);
  }
}

// For warp 0: t of a panel, from all warps and blocks, to shared memory.
template <typename T>
__device__ __noinline__ void share_t(const SpectralArgs& a, const SpectralEntry& e,
                                     const SpectralItem& item, unsigned before, MmaShared<T>& s,
                                     float scale) {
  constexpr int kValues = kPanel / 4;
  float t[kValues];
  sum_of_team<kWarps / 2>(team_of(a, e, item, before), s.parts[0], t);
  const int probe = lane_index() % kProbes, row = lane_index() / kProbes * kValues;
  int exponent = 0;
  if (Half<T>::kNarrow) {
    float top = 0;
    for (int v = 0; v < kValues; ++v) top = fmaxf(top, fabsf(t[v] * scale));
    for (int apart = kProbes; apart < kLanes; apart *= 2) {
      top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, apart));
    }
    exponent = exponent_for(top);
    if (row == 0) s.unit[1][probe] = ldexpf(1, exponent);
  }
  for (int v = 0; v < kValues; ++v) {
    const int place = probe * kPanel + row + v;
    store_parts(ldexpf(t[v] * scale, -exponent), s.t[0][place], s.t[1][place]);
  }
}

template <typename T, bool kTransposed>
__device__ __noinline__ void apply_mma(const SpectralArgs& a, const SpectralEntry& e,
                                       const SpectralItem& item, int64_t step, float scale) {
  TB_DYNAMIC_SHARED(unsigned char, memory);
  auto& s = *reinterpret_cast<MmaShared<T>*>(memory);
  using Panel = MmaPanel<T, kTransposed>;
  constexpr int kBlocks = kSegment / 16 / kWarps;
  const int warp = warp_index(), lane = lane_index();
  const int64_t first_row = int64_t{item.slice} * e.slice_rows;
  const int64_t first_column = int64_t{item.segment} * kSegment;
  const int64_t rows = e.rows - first_row < e.slice_rows ? e.rows - first_row : e.slice_rows;
  const int columns =
      e.length - first_column < kSegment ? static_cast<int>(e.length - first_column) : kSegment;
  const auto panels = static_cast<int>((rows + kPanel - 1) / kPanel);

  PanelStream<T, kPanel, kTransposed> stream(e, first_row, first_column);
  stream.fetch(e, s.stage[0], static_cast<int>(rows), columns, Panel::place);
  cp_async_commit();
  share_x(s, a.floats + e.basis + step * kProbes * e.length + first_column, e.length, columns);
  // Of the right operands a lane reads a row of 8 numbers of a probe: of the high or the low part.
  const int part = lane / 16, half = lane / 8 % 2 * 8, probe = lane % 8;
  const T* x_from = s.x[0] + part * kProbes * kSegment + place_in_rows(probe, warp * 16 + half);
  const T* t_from = s.t[0] + part * kProbes * kPanel + probe * kPanel + half;
  const int left_from = Panel::left_place(), right_from = Panel::left_transposed_place();

  float y[kBlocks][4] = {};
  for (int panel = 0; panel < panels; ++panel) {
    const T* now = s.stage[0] + panel % 2 * MmaShared<T>::kStage;
    if (panel + 1 < panels) {
      stream.fetch(e, s.stage[0] + (panel + 1) % 2 * MmaShared<T>::kStage,
                   static_cast<int>(rows) - (panel + 1) * kPanel, columns, Panel::place);
    }
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();

    float t[4] = {};
    uint32_t left[4], right[4];
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      if ((warp + i * kWarps) * 16 >= columns) continue;
      Panel::load(left, now + left_from + i * Panel::kNext);
      ldmatrix_x4(right, x_from + i * kNextInRows);
      mma_16816<T>(t, left, {right[0], right[1]});
      mma_16816<T>(t, left, {right[2], right[3]});
    }
    // Lane l has the rows l / 4 and l / 4 + 8 of the probes 2 (l % 4) and 2 (l % 4) + 1.
    if (Half<T>::kNarrow) {
      t[0] *= s.unit[0][2 * (lane % 4)], t[1] *= s.unit[0][2 * (lane % 4) + 1];
      t[2] *= s.unit[0][2 * (lane % 4)], t[3] *= s.unit[0][2 * (lane % 4) + 1];
    }
    float* sums = s.parts[warp % (kWarps / 2)];
    const int place = lane / 4 * kProbes + 2 * (lane % 4);
    if (warp >= kWarps / 2) {
      for (int v = 0; v < 4; ++v) sums[place + v / 2 * 8 * kProbes + v % 2] = t[v];
    }
    __syncthreads();
    if (warp < kWarps / 2) {
      for (int v = 0; v < 4; ++v) sums[place + v / 2 * 8 * kProbes + v % 2] += t[v];
    }
    __syncthreads();
    if (warp == 0) {
      share_t<T>(a, e, item, static_cast<unsigned>(step) * panels + panel, s, scale);
    }
    __syncthreads();

    ldmatrix_x4(right, t_from);
    const float2 unit = Half<T>::kNarrow
                            ? *reinterpret_cast<const float2*>(s.unit[1] + 2 * (lane % 4))
                            : float2{1, 1};
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      if ((warp + i * kWarps) * 16 >= columns) continue;
      Panel::load_transposed(left, now + right_from + i * Panel::kNext);
      if (Half<T>::kNarrow) {
        float scaled[4] = {};
        mma_16816<T>(scaled, left, {right[0], right[1]});
        mma_16816<T>(scaled, left, {right[2], right[3]});
        for (int v = 0; v < 4; ++v) y[i][v] += (v % 2 == 0 ? unit.x : unit.y) * scaled[v];
      } else {
        mma_16816<T>(y[i], left, {right[0], right[1]});
        mma_16816<T>(y[i], left, {right[2], right[3]});
      }
    }
    __syncthreads();
  }
  cp_async_wait<0>();

  float* out = a.floats + e.partials + int64_t{item.slice} * kProbes * e.length + first_column;
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    for (int v = 0; v < 4; ++v) {
      const int column = (warp + i * kWarps) * 16 + lane / 4 + v / 2 * 8;
      const int probe = 2 * (lane % 4) + v % 2;
      if (column < columns) out[probe * e.length + column] = y[i][v];
    }
  }
}

}  // namespace tb::gpu
