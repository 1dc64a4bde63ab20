// A short vector of T: the compiler's vector type where there is one, else an array. Included only
// by files that are compiled once per instruction set; everything lives in that set's namespace.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(_MSC_VER)
#include <math.h>
#endif

#if defined(TB_ISA_AVX512)
#define TB_ISA avx512
#define TB_VECTOR_BYTES 64
#elif defined(TB_ISA_AVX2)
#define TB_ISA avx2
#define TB_VECTOR_BYTES 32
#else
#define TB_ISA scalar
#define TB_VECTOR_BYTES 16
#endif

// Memory that no other pointer of the function reaches.
#define TB_RESTRICT __restrict

namespace tb {
namespace TB_ISA {

// sqrt without <cmath>, whose inline functions must not be instantiated for a wider machine.
inline double square_root(double x) {
#if defined(__GNUC__)
  return __builtin_sqrt(x);
#else
  return sqrt(x);
#endif
}

#if defined(TB_ISA_AVX512)
constexpr int kWidth = 8;  // columns of a symmetric product at a time: sums and scales in registers
#else
constexpr int kWidth = 4;
#endif

#if defined(__GNUC__)

template <typename T>
struct Vec {
  static constexpr int size = TB_VECTOR_BYTES / sizeof(T);
  typedef T Data __attribute__((vector_size(TB_VECTOR_BYTES)));
  Data data;

  static Vec load(const T* from) {
    Vec out;
    std::memcpy(&out.data, from, sizeof(Data));
    return out;
  }
  void store(T* to) const { std::memcpy(to, &data, sizeof(Data)); }
  static Vec fill(T value) { return {value - Data{}}; }
  static Vec zero() { return {Data{}}; }
  void add_product(Vec a, Vec b) { data += a.data * b.data; }
  friend Vec operator+(Vec a, Vec b) { return {a.data + b.data}; }
  friend Vec operator-(Vec a, Vec b) { return {a.data - b.data}; }
  T sum() const { return fold<size / 2>(data); }

  // Lanes of a, and beyond them of b, by number.
  template <int... kLane>
  static Vec pick(Vec a, Vec b) {
    return {__builtin_shufflevector(a.data, b.data, kLane...)};
  }

  // Lane l of the result is lane l of a where bit kHalf of l is clear, of b where it is set, plus
  // the lane kHalf away in the same vector.
  template <int kHalf>
  static Vec fold_pair(Vec a, Vec b) {
    return fold_pair_lanes<kHalf>(a, b, std::make_integer_sequence<int, size>());
  }

 private:
  template <int kHalf, int... kLane>
  static Vec fold_pair_lanes(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
    return {
        __builtin_shufflevector(a.data, b.data, (kLane + (kLane & kHalf ? size : 0))...) +
        __builtin_shufflevector(a.data, b.data, ((kLane ^ kHalf) + (kLane & kHalf ? size : 0))...)};
  }

  // Adds the halves, then the quarters, ...
  template <int kHalf>
  static T fold(Data d) {
    if constexpr (kHalf == 0) {
      return d[0];
    } else {
      d += flipped<kHalf>(d, std::make_integer_sequence<int, size>());
      return fold<kHalf / 2>(d);
    }
  }
  template <int kHalf, int... kLane>
  static Data flipped(Data d, std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(d, d, (kLane ^ kHalf)...);
  }
};

#else

template <typename T>
struct Vec {
  static constexpr int size = TB_VECTOR_BYTES / sizeof(T);
  T data[size];

  static Vec load(const T* from) {
    Vec out;
    std::memcpy(out.data, from, sizeof(out.data));
    return out;
  }
  void store(T* to) const { std::memcpy(to, data, sizeof(data)); }
  static Vec fill(T value) {
    Vec out;
    for (T& x : out.data) x = value;
    return out;
  }
  static Vec zero() { return fill(T(0)); }
  void add_product(Vec a, Vec b) {
    for (int i = 0; i < size; ++i) data[i] += a.data[i] * b.data[i];
  }
  friend Vec operator+(Vec a, Vec b) {
    for (int i = 0; i < size; ++i) a.data[i] += b.data[i];
    return a;
  }
  friend Vec operator-(Vec a, Vec b) {
    for (int i = 0; i < size; ++i) a.data[i] -= b.data[i];
    return a;
  }
  T sum() const {
    T total = 0;
    for (T x : data) total += x;
    return total;
  }
  template <int... kLane>
  static Vec pick(Vec a, Vec b) {
    const int lanes[] = {kLane...};
    Vec out;
    for (int l = 0; l < size; ++l) {
      out.data[l] = lanes[l] < size ? a.data[lanes[l]] : b.data[lanes[l] - size];
    }
    return out;
  }
  template <int kHalf>
  static Vec fold_pair(Vec a, Vec b) {
    Vec out;
    for (int l = 0; l < size; ++l) {
      const Vec& from = l & kHalf ? b : a;
      out.data[l] = from.data[l] + from.data[l ^ kHalf];
    }
    return out;
  }
};

#endif

// The sums over the lanes of as many vectors as a vector has lanes, in their order.
template <typename T, int kHalf = 1>
inline Vec<T> sums(Vec<T>* vectors) {
  if constexpr (kHalf == Vec<T>::size) {
    return vectors[0];
  } else {
    for (int i = 0; i < Vec<T>::size / (2 * kHalf); ++i) {
      vectors[i] = Vec<T>::template fold_pair<kHalf>(vectors[2 * i], vectors[2 * i + 1]);
    }
    return sums<T, 2 * kHalf>(vectors);
  }
}

// Asks for a cache line that will be read soon, into the second-level cache.
inline void prefetch(const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address, 0, 2);
#else
  (void)address;
#endif
}

}  // namespace TB_ISA
}  // namespace tb
