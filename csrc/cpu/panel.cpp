// The two halves of y += W^T (W x) on a panel of W that stays in cache between them, and what turns
// any weight into such a panel. Compiled once per instruction set.
//
// Four probes at a time, kProbes. A panel has a multiple of kPanelRows rows and of kLanes columns;
// whoever calls pads with zeros, so no loop has a remainder.
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/isa.h"
#include "cpu/vec.h"

namespace tb {
namespace TB_ISA {
namespace {

using V = Vec<float>;
constexpr int kRows = V::size / kProbes;  // then the sums of a tile fill one vector
constexpr int kRowsAdded = V::size == 16 ? 4 : 2;

// Asks for the next lines of the panel ahead.
inline void fetch(Ahead& next) {
  if (next.at == nullptr) return;
  prefetch(next.at);
  prefetch(next.at + next.second);
  next.at += next.step;
  if (--next.left == 0) {
    next.left = next.steps;
    next.column += 64;
    next.at = next.column < next.end ? next.column : nullptr;
  }
}

}  // namespace

void panel_products(const float* w, int64_t ld, int64_t rows, int64_t cols, const float* x,
                    int64_t ldx, float* sums, Ahead* next) {
  Ahead ahead = *next;
  for (int64_t r = 0; r < rows; r += kRows) {
    const float* row = w + r * ld;
    float* mine = sums + r * kProbes * V::size;
    V sum[kRows * kProbes];
    for (int i = 0; i < kRows * kProbes; ++i) sum[i] = V::load(mine + i * V::size);
    for (int64_t c = 0; c < cols; c += V::size) {
      V right[kProbes];
      for (int p = 0; p < kProbes; ++p) right[p] = V::load(x + p * ldx + c);
      if (c % kLanes == 0) fetch(ahead);
      for (int i = 0; i < kRows; ++i) {
        const V element = V::load(row + i * ld + c);
        for (int p = 0; p < kProbes; ++p) sum[i * kProbes + p].add_product(element, right[p]);
      }
    }
    for (int i = 0; i < kRows * kProbes; ++i) sum[i].store(mine + i * V::size);
  }
  *next = ahead;
}

void panel_sums(int64_t rows, float* lanes, float* t) {
  for (int64_t r = 0; r < rows; r += kRows) {
    V sum[kRows * kProbes];
    for (int i = 0; i < kRows * kProbes; ++i) {
      sum[i] = V::load(lanes + (r * kProbes + i) * V::size);
    }
    sums<float>(sum).store(t + r * kProbes);
  }
}

void panel_accumulate(const float* w, int64_t ld, int64_t rows, int64_t cols, const float* t,
                      float* y, int64_t ldy, Ahead* next) {
  Ahead ahead = *next;
  for (int64_t r = 0; r < rows; r += kRowsAdded) {
    const float* row = w + r * ld;
    V scale[kRowsAdded][kProbes];
    for (int i = 0; i < kRowsAdded; ++i) {
      for (int p = 0; p < kProbes; ++p) scale[i][p] = V::fill(t[(r + i) * kProbes + p]);
    }
    for (int64_t c = 0; c < cols; c += V::size) {
      V element[kRowsAdded];
      for (int i = 0; i < kRowsAdded; ++i) element[i] = V::load(row + i * ld + c);
      if (c % kLanes == 0) fetch(ahead);
      for (int p = 0; p < kProbes; ++p) {
        float* out = y + p * ldy + c;
        V sum = V::load(out);
        for (int i = 0; i < kRowsAdded; ++i) sum.add_product(element[i], scale[i][p]);
        sum.store(out);
      }
    }
  }
  *next = ahead;
}

namespace {

// Branch-free, so that the loops around it become vector code.
inline float widened(uint16_t bits) {  // IEEE half precision
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fffu) << 13;
  float scaled;  // the exponent's bias is 112 too small, for subnormal numbers too
  std::memcpy(&scaled, &magnitude, 4);
  scaled *= 5.192296858534828e33f;  // 2^112
  uint32_t out;
  std::memcpy(&out, &scaled, 4);
  out |= magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinity and NaN keep their exponent
  out |= sign;
  std::memcpy(&scaled, &out, 4);
  return scaled;
}

inline float widened_bf16(uint16_t bits) {
  const uint32_t out = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &out, 4);
  return value;
}

template <typename T, typename Widen>
inline void convert_run(const T* from, int64_t stride, int64_t n, float* to, Widen widen) {
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i * stride]);
  }
}

// Complex elements as two real rows: (re, -im, ...) and (im, re, ...).
template <typename T>
inline void convert_complex(const T* from, int64_t stride, int64_t n, T scale, T sign, float* to,
                            float* second) {
  for (int64_t i = 0; i < n; ++i) {
    const float re = static_cast<float>(from[2 * i * stride] * scale);
    const float im = static_cast<float>(from[2 * i * stride + 1] * scale * sign);
    to[2 * i] = re;
    to[2 * i + 1] = -im;
    second[2 * i] = im;
    second[2 * i + 1] = re;
  }
}

}  // namespace

void convert(const void* from, DType dtype, int64_t stride, int64_t n, double scale, bool conjugate,
             float* to, float* second) {
  const auto factor = static_cast<float>(scale);
  const double sign = conjugate ? -1 : 1;
  switch (dtype) {
    case DType::f16:
      return convert_run(static_cast<const uint16_t*>(from), stride, n, to,
                         [=](uint16_t x) { return widened(x) * factor; });
    case DType::bf16:
      return convert_run(static_cast<const uint16_t*>(from), stride, n, to,
                         [=](uint16_t x) { return widened_bf16(x) * factor; });
    case DType::f32:
      return convert_run(static_cast<const float*>(from), stride, n, to,
                         [=](float x) { return x * factor; });
    case DType::f64:
      return convert_run(static_cast<const double*>(from), stride, n, to,
                         [=](double x) { return static_cast<float>(x * scale); });
    case DType::c64:
      return convert_complex(static_cast<const float*>(from), stride, n, factor,
                             static_cast<float>(sign), to, second);
    case DType::c128:
      return convert_complex(static_cast<const double*>(from), stride, n, scale, sign, to, second);
  }
}

namespace {

// Exchanges rows and columns of a square of vectors: at each step the halves, quarters, ... off the
// diagonal change places.
template <int kHalf, int... kLane>
inline void transpose_step(V* rows, std::integer_sequence<int, kLane...>) {
  for (int i = 0; i < V::size; ++i) {
    if (i & kHalf) continue;
    const V upper = rows[i], lower = rows[i + kHalf];
    rows[i] = V::template pick<(kLane & kHalf ? V::size + kLane - kHalf : kLane)...>(upper, lower);
    rows[i + kHalf] =
        V::template pick<(kLane & kHalf ? V::size + kLane : kLane + kHalf)...>(upper, lower);
  }
}

template <int kHalf = 1>
inline void transpose(V* rows) {
  if constexpr (kHalf < V::size) {
    transpose_step<kHalf>(rows, std::make_integer_sequence<int, V::size>());
    transpose<2 * kHalf>(rows);
  }
}

// to[c * ld + i] = from[i * stride + c] for i < n and c < count
template <typename T, typename Widen>
void transpose_run(const T* from, int64_t stride, int64_t n, int64_t count, float* to, int64_t ld,
                   Widen widen) {
  constexpr int64_t kAhead = 4 * V::size;
  int64_t i = 0;
  for (; i + V::size <= n; i += V::size) {
    if (i + kAhead + V::size <= n) {
      for (int64_t k = 0; k < V::size; ++k) {
        const T* row = from + (i + kAhead + k) * stride;
        for (int64_t c = 0; c < count; c += kLanes) prefetch(row + c);
      }
    }
    for (int64_t c = 0; c + V::size <= count; c += V::size) {
      V rows[V::size];
      for (int k = 0; k < V::size; ++k) {
        float row[V::size];
        for (int l = 0; l < V::size; ++l) row[l] = widen(from[(i + k) * stride + c + l]);
        rows[k] = V::load(row);
      }
      transpose(rows);
      for (int k = 0; k < V::size; ++k) rows[k].store(to + (c + k) * ld + i);
    }
    for (int64_t c = count - count % V::size; c < count; ++c) {
      for (int64_t k = i; k < i + V::size; ++k) to[c * ld + k] = widen(from[k * stride + c]);
    }
  }
  for (; i < n; ++i) {
    for (int64_t c = 0; c < count; ++c) to[c * ld + i] = widen(from[i * stride + c]);
  }
}

}  // namespace

void convert_columns(const void* from, DType dtype, int64_t stride, int64_t n, int64_t count,
                     double scale, float* to, int64_t ld) {
  const auto factor = static_cast<float>(scale);
  switch (dtype) {
    case DType::f16:
      return transpose_run(static_cast<const uint16_t*>(from), stride, n, count, to, ld,
                           [=](uint16_t x) { return widened(x) * factor; });
    case DType::bf16:
      return transpose_run(static_cast<const uint16_t*>(from), stride, n, count, to, ld,
                           [=](uint16_t x) { return widened_bf16(x) * factor; });
    case DType::f32:
      return transpose_run(static_cast<const float*>(from), stride, n, count, to, ld,
                           [=](float x) { return x * factor; });
    case DType::f64:
      return transpose_run(static_cast<const double*>(from), stride, n, count, to, ld,
                           [=](double x) { return static_cast<float>(x * scale); });
    case DType::c64:
    case DType::c128:
      break;  // not by columns: see Product
  }
}

}  // namespace TB_ISA
}  // namespace tb
