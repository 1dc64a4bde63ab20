// Vector work of Lanczos against the basis found so far. Compiled once per instruction set.
// Products are summed in float within a block and in double across blocks.
#include <cstdint>

#include "cpu/isa.h"
#include "cpu/vec.h"

namespace tb {
namespace TB_ISA {
namespace {

using V = Vec<float>;
constexpr int64_t kBlock = 512;
constexpr int kGroup = 4;  // basis vectors for each pass over w

template <int kCount>
void inner_products(const float* q, int64_t stride, const float* w, int64_t n, double* out) {
  for (int k = 0; k < kCount; ++k) out[k] = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = begin + kBlock < n ? begin + kBlock : n;
    V sum[kCount];
    for (V& s : sum) s = V::zero();
    for (int64_t i = begin; i < end; i += V::size) {
      const V right = V::load(w + i);
      for (int k = 0; k < kCount; ++k) sum[k].add_product(V::load(q + k * stride + i), right);
    }
    for (int k = 0; k < kCount; ++k) out[k] += static_cast<double>(sum[k].sum());
  }
}

template <int kCount>
void subtract(const float* q, int64_t stride, const double* scale, float* w, int64_t n) {
  V minus[kCount];
  for (int k = 0; k < kCount; ++k) minus[k] = V::fill(static_cast<float>(-scale[k]));
  for (int64_t i = 0; i < n; i += V::size) {
    V sum = V::load(w + i);
    for (int k = 0; k < kCount; ++k) sum.add_product(minus[k], V::load(q + k * stride + i));
    sum.store(w + i);
  }
}

}  // namespace

double inner_product(const float* x, const float* y, int64_t n) {
  double out;
  inner_products<1>(x, 0, y, n, &out);
  return out;
}

void project_out(const float* q, int64_t stride, int64_t count, float* w, int64_t n,
                 double* scratch) {
  int64_t k = 0;
  for (; k + kGroup <= count; k += kGroup) {
    inner_products<kGroup>(q + k * stride, stride, w, n, scratch + k);
  }
  for (; k < count; ++k) inner_products<1>(q + k * stride, stride, w, n, scratch + k);
  for (k = 0; k + kGroup <= count; k += kGroup) {
    subtract<kGroup>(q + k * stride, stride, scratch + k, w, n);
  }
  for (; k < count; ++k) subtract<1>(q + k * stride, stride, scratch + k, w, n);
}

void subtract_scaled(const float* q, double scale, float* w, int64_t n) {
  subtract<1>(q, 0, &scale, w, n);
}

void scaled_copy(const float* from, double scale, float* to, int64_t n) {
  const V factor = V::fill(static_cast<float>(scale));
  for (int64_t i = 0; i < n; i += V::size) {
    V out = V::zero();
    out.add_product(factor, V::load(from + i));
    out.store(to + i);
  }
}

}  // namespace TB_ISA
}  // namespace tb
