// The loops that are compiled once per instruction set, and the table that picks one.
#pragma once

#include <cstdint>

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

struct Kernels {
  const char* isa;
  KsDistance ks_distance;
  Tridiagonalize<float> tridiagonalize_f32;
  Tridiagonalize<double> tridiagonalize_f64;
};

// The table for the instruction set in use; see tb::isa().
const Kernels& kernels();

namespace scalar {
double ks_distance(const double* logs, int64_t n, double alpha, double bound);
void tridiagonalize_f32(float* a, int64_t n, double* d, double* e, float* work);
void tridiagonalize_f64(double* a, int64_t n, double* d, double* e, double* work);
}  // namespace scalar
namespace avx2 {
double ks_distance(const double* logs, int64_t n, double alpha, double bound);
void tridiagonalize_f32(float* a, int64_t n, double* d, double* e, float* work);
void tridiagonalize_f64(double* a, int64_t n, double* d, double* e, double* work);
}  // namespace avx2
namespace avx512 {
double ks_distance(const double* logs, int64_t n, double alpha, double bound);
void tridiagonalize_f32(float* a, int64_t n, double* d, double* e, float* work);
void tridiagonalize_f64(double* a, int64_t n, double* d, double* e, double* work);
}  // namespace avx512

}  // namespace tb
