// The numbers that factors are made of: float, double, and complex ones of them.
#pragma once

#include "cuda/instructions.h"

namespace tb::gpu {

template <typename Real>
struct alignas(2 * sizeof(Real)) Complex {
  Real re, im;

  __device__ Complex operator+(Complex b) const { return {re + b.re, im + b.im}; }
  __device__ Complex operator-(Complex b) const { return {re - b.re, im - b.im}; }
  __device__ Complex operator*(Complex b) const {
    return {re * b.re - im * b.im, re * b.im + im * b.re};
  }
  __device__ Complex operator*(Real b) const { return {re * b, im * b}; }
  __device__ Complex operator/(Real b) const { return {re / b, im / b}; }
};

// The scalar that weights stored in some type become; its real type; and it in double precision.
template <typename Stored>
struct ScalarOf {
  using type = float;
};
template <>
struct ScalarOf<double> {
  using type = double;
};
template <>
struct ScalarOf<float2> {
  using type = Complex<float>;
};
template <>
struct ScalarOf<double2> {
  using type = Complex<double>;
};

template <typename S>
struct Traits {
  using Real = S;
  using Wide = double;
  static constexpr int kParts = 1;
};
template <typename R>
struct Traits<Complex<R>> {
  using Real = R;
  using Wide = Complex<double>;
  static constexpr int kParts = 2;
};
template <typename S>
using RealOf = typename Traits<S>::Real;
template <typename S>
using WideOf = typename Traits<S>::Wide;

__device__ inline float scalar(__half x) { return __half2float(x); }
__device__ inline float scalar(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float scalar(float x) { return x; }
__device__ inline double scalar(double x) { return x; }
__device__ inline Complex<float> scalar(float2 x) { return {x.x, x.y}; }
__device__ inline Complex<double> scalar(double2 x) { return {x.x, x.y}; }

__device__ inline void add_product(float& sum, float a, float b) { sum += a * b; }
__device__ inline void add_product(double& sum, double a, double b) { sum += a * b; }
template <typename R>
__device__ inline void add_product(Complex<R>& sum, Complex<R> a, Complex<R> b) {
  sum.re += a.re * b.re;
  sum.re -= a.im * b.im;
  sum.im += a.re * b.im;
  sum.im += a.im * b.re;
}

__device__ inline float conjugate(float x) { return x; }
__device__ inline double conjugate(double x) { return x; }
template <typename R>
__device__ inline Complex<R> conjugate(Complex<R> x) {
  return {x.re, -x.im};
}

__device__ inline double real(double x) { return x; }
__device__ inline double real(Complex<double> x) { return x.re; }

__device__ inline double widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
template <typename R>
__device__ inline Complex<double> widen(Complex<R> x) {
  return {x.re, x.im};
}

__device__ inline double square(double x) { return x * x; }
__device__ inline double square(Complex<double> x) { return x.re * x.re + x.im * x.im; }

// The larger of the sizes of the parts.
__device__ inline double size(double x) { return fabs(x); }
__device__ inline double size(Complex<double> x) {
  // A NaN must come through, so it may not be compared away.
  return fabs(x.im) <= fabs(x.re) ? fabs(x.re) : fabs(x.im) + 0 * fabs(x.re);
}

// From parts: the imaginary one is of no account where there is none.
template <typename S>
__device__ inline S from_parts(double re, double im) {
  if constexpr (Traits<S>::kParts == 2) {
    return {static_cast<RealOf<S>>(re), static_cast<RealOf<S>>(im)};
  } else {
    return static_cast<S>(re);
  }
}

__device__ inline double imaginary(double) { return 0; }
__device__ inline double imaginary(Complex<double> x) { return x.im; }

template <typename S>
__device__ inline S narrow(WideOf<S> x) {
  return from_parts<S>(real(x), imaginary(x));
}

}  // namespace tb::gpu
