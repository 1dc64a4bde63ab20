// The loops that are compiled once per instruction set, and the table that picks one.
#pragma once

#include <cstdint>

#include "cpu/merge_kernels.h"
#include "ragged.h"

namespace tb {

// max_j |1 - exp((1 - alpha)(logs[j] - logs[0])) - j / n| over 0 <= j < n, or some value above
// `bound` as soon as the maximum is known to exceed it.
//   logs: n ascending logarithms
using KsDistance = double (*)(const double* logs, int64_t n, double alpha, double bound);

// Leading dimension of an n x n matrix to be tridiagonalised: n padded to a multiple of kPad.
constexpr int64_t kPad = 32;
constexpr int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// Elements of scratch that tridiagonalisation needs.
constexpr int64_t tridiagonal_work(int64_t n) { return 64 * padded(n); }

// Q^T A Q = T, tridiagonal, for a symmetric A.
//   a: padded(n) columns of padded(n) elements, zero beyond n; the lower triangle and the 16 x 16
//      blocks on the diagonal are read; overwritten
//   diagonal: n     off_diagonal: n - 1     work: tridiagonal_work(n) zeros
template <typename T>
using Tridiagonalize = void (*)(T* a, int64_t n, double* diagonal, double* off_diagonal, T* work);

// The same for kTogether complex Hermitian matrices at once, up to the phases of the off-diagonal
// elements. Element (i, j) has its real parts, one of each matrix, from
// a[2 * kTogether * (j * n + i)] on, and then its imaginary parts.
//   a: the lower triangles; overwritten     diagonal: n * kTogether
//   squares: (n - 1) * kTogether, of the magnitudes of the off-diagonal elements
//   work: 4 * kTogether * n
constexpr int64_t kTogether = 8;

// A fused pass over W works on panels of kPanelRows rows, on columns padded to kLanes, and on
// kProbes vectors at a time. The vectors of all probes lie one after the other, the coefficients of
// a panel by rows.
constexpr int64_t kPanelRows = 4;  // and multiples of it
constexpr int64_t kLanes = 16;
constexpr int64_t kProbes = 4;
constexpr int64_t kRowSums = kProbes * kLanes;

// A walk over the panel that comes next, to have it in cache by then: a line of each row in turn,
// because memory serves many places at once faster than one.
struct Ahead {
  const char* at = nullptr;      // the line to ask for next; null when there is none left
  int64_t second = 0, step = 0;  // a second line beside it, and the way to the next, in bytes
  int64_t steps = 0;             // steps to walk down a column of lines
  int64_t left = 0;              // of those
  const char* column = nullptr;  // the line in the first row
  const char* end = nullptr;     // of the first row
};

// Everything that is compiled once per instruction set.
#define TB_DECLARE_KERNELS                                                                         \
  double ks_distance(const double* logs, int64_t n, double alpha, double bound);                   \
  void tridiagonalize_f32(float* a, int64_t n, double* d, double* e, float* work);                 \
  void tridiagonalize_f64(double* a, int64_t n, double* d, double* e, double* work);               \
  void tridiagonalize_hermitian(double* a, int64_t n, double* diagonal, double* squares,           \
                                double* work);                                                     \
  /* dot += sum of w g, square += sum of w^2 */                                                    \
  void inner_f32(const float* w, const int8_t* g, int64_t n, double* dot, double* square);         \
  void inner_f64(const double* w, const int8_t* g, int64_t n, double* dot, double* square);        \
  /* sums += those of (w - kept)^2, (w - kept) kept and kept^2 */                                  \
  void movement_f32(const float* w, const float* kept, int64_t n, double* sums);                   \
  void movement_f64(const double* w, const float* kept, int64_t n, double* sums);                  \
  /* sums[r][p] += lanes of w[r][c] x[p][c]: kRowSums floats for each row, see panel_sums */       \
  void panel_products(const float* w, int64_t ld, int64_t rows, int64_t cols, const float* x,      \
                      int64_t ldx, float* sums, Ahead* next);                                      \
  /* t[r][p] = the sum of the lanes */                                                             \
  void panel_sums(int64_t rows, float* sums, float* t);                                            \
  /* y[p][c] += sum over r of w[r][c] t[r][p] */                                                   \
  void panel_accumulate(const float* w, int64_t ld, int64_t rows, int64_t cols, const float* t,    \
                        float* y, int64_t ldy, Ahead* next);                                       \
  /* n elements as float, times scale; a complex row becomes two of 2 n: see ragged.h */           \
  void convert(const void* from, DType dtype, int64_t stride, int64_t n, double scale,             \
               bool conjugate, float* to, float* second);                                          \
  /* to[c][i] = from[i][c] times scale for i < n, c < count, rows of `from` `stride` apart; not */ \
  /* complex */                                                                                    \
  void convert_columns(const void* from, DType dtype, int64_t stride, int64_t n, int64_t count,    \
                       double scale, float* to, int64_t ld);                                       \
  /* vectors of n elements, a multiple of kLanes */                                                \
  double inner_product(const float* x, const float* y, int64_t n);                                 \
  void subtract_scaled(const float* q, double scale, float* w, int64_t n);                         \
  void scaled_copy(const float* from, double scale, float* to, int64_t n);                         \
  /* w -= sum over k of q_k <q_k, w>, `count` vectors q_k `stride` apart; scratch: count */        \
  void project_out(const float* q, int64_t stride, int64_t count, float* w, int64_t n,             \
                   double* scratch);                                                               \
  /* C += A X for `width` columns, whole cache lines; element (i, k) of A is                       \
     a[i row_step + k depth_step], rows of X and C begin every ld */                               \
  void skinny_product_f32(const float* a, int64_t row_step, int64_t depth_step, int64_t rows,      \
                          int64_t depth, const float* x, float* c, int64_t width, int64_t ld);     \
  void skinny_product_f64(const double* a, int64_t row_step, int64_t depth_step, int64_t rows,     \
                          int64_t depth, const double* x, double* c, int64_t width, int64_t ld);   \
  /* sum of x^2, in double */                                                                      \
  double square_sum_f32(const float* x, int64_t n);                                                \
  double square_sum_f64(const double* x, int64_t n);                                               \
  /* Rotates every pair of rows until their first `length` elements are orthogonal up to a         \
     cosine of `tolerance`, and what follows with them, the longer row first; whether any was      \
     rotated. rows: real form of a complex matrix if parts is 2, see small.h; length and ld        \
     whole cache lines. squares: count, overwritten with |row|^2 */                                \
  bool jacobi_sweep(double* rows, int64_t count, int64_t length, int64_t ld, int64_t parts,        \
                    double tolerance, double* squares);                                            \
  /* sum of n words modulo 2^64: how fast memory can be read */                                    \
  uint64_t stream_sum(const uint64_t* words, int64_t n);                                           \
  /* `steps` times fma_flops_per_step() operations in registers: how fast floats multiply */       \
  double fma_chains(int64_t steps);                                                                \
  int64_t fma_flops_per_step();

namespace scalar {
TB_DECLARE_KERNELS
}
namespace avx2 {
TB_DECLARE_KERNELS
}
namespace avx512 {
TB_DECLARE_KERNELS
}

// y += W^T (W x), or W (W^T x) if `wide`, for 16 probes and a bfloat16 W that is read from memory
// once. x and the inner product are rounded to bfloat16, sums are float32; subnormal numbers count
// as zero. Slices of rows of a tall W, or of columns of a wide one, add up to the whole.
//   w: rows x cols, `ld` apart, columns adjacent; nothing outside is read
//   x, y: (16, cols), or (16, rows) if `wide`; element i of probe p at x[p * ldx + i]
//   scratch: gram_bf16_scratch(cols, false) or (rows, true) bytes
using GramBf16Apply = void (*)(const uint16_t* w, int64_t ld, int64_t rows, int64_t cols, bool wide,
                               const float* x, int64_t ldx, float* y, int64_t ldy, void* scratch);
constexpr int64_t kBf16Probes = 16;
int64_t gram_bf16_scratch(int64_t length, bool wide);

// The functions of one instruction set.
struct Kernels {
  const char* isa;
  KsDistance ks_distance;
  Tridiagonalize<float> tridiagonalize_f32;
  Tridiagonalize<double> tridiagonalize_f64;
  decltype(&scalar::tridiagonalize_hermitian) tridiagonalize_hermitian;
  decltype(&scalar::inner_f32) inner_f32;
  decltype(&scalar::inner_f64) inner_f64;
  decltype(&scalar::movement_f32) movement_f32;
  decltype(&scalar::movement_f64) movement_f64;
  decltype(&scalar::panel_products) panel_products;
  decltype(&scalar::panel_sums) panel_sums;
  decltype(&scalar::panel_accumulate) panel_accumulate;
  decltype(&scalar::convert) convert;
  decltype(&scalar::convert_columns) convert_columns;
  decltype(&scalar::inner_product) inner_product;
  decltype(&scalar::subtract_scaled) subtract_scaled;
  decltype(&scalar::scaled_copy) scaled_copy;
  decltype(&scalar::project_out) project_out;
  decltype(&scalar::skinny_product_f32) skinny_product_f32;
  decltype(&scalar::skinny_product_f64) skinny_product_f64;
  decltype(&scalar::square_sum_f32) square_sum_f32;
  decltype(&scalar::square_sum_f64) square_sum_f64;
  decltype(&scalar::jacobi_sweep) jacobi_sweep;
  decltype(&scalar::stream_sum) stream_sum;
  decltype(&scalar::fma_chains) fma_chains;
  decltype(&scalar::fma_flops_per_step) fma_flops_per_step;
  const MergeKernels& merge;
  const MergeArithmetic<float>& merge_f32;
  const MergeArithmetic<double>& merge_f64;
  GramBf16Apply gram_bf16 = nullptr;  // where the machine multiplies bfloat16
};

// The table for the instruction set in use; see tb::isa().
const Kernels& kernels();

}  // namespace tb
