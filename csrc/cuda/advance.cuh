// What happens to the vectors of one Lanczos run between two products: one block has a run (an
// entry and one of its start vectors) to itself.
//
//   start    q_0 = random signs, or a given vector, normalised
//   advance  w = y summed over slices;  alpha_j = q_j . w;  w -= alpha_j q_j + beta_{j-1} q_{j-1}
//            w is made orthogonal to all q_i once more;  beta_j = |w|;  q_{j+1} = w / beta_j
//            the run ends where beta_j is rounding: an invariant subspace is found
//
// The rules and constants are those of csrc/cpu/lanczos.cpp. Sums run over a thread's elements in
// float and over threads in double. The definition: tbfast/backends/reference_lanczos.py.
#pragma once

#include "cuda/block.h"
#include "cuda/spectral_args.h"
#include "philox.h"

namespace tb::gpu {

constexpr double kFloatEps = 1.1920928955078125e-07;

// Below this, relative to the norm of A, what is left of a new vector is rounding.
constexpr double kInvariant = 10 * kFloatEps;

// Mean eigenvalues between these: squares of entries stay well inside the range of float.
constexpr double kSmallestMean = 1e-12, kLargestMean = 1e12;

// One start vector of an entry.
struct Run {
  const SpectralEntry& e;
  int probe;
  float* basis;  // q_0; q_j is `stride` after q_{j-1}
  float* w;
  int64_t stride;
  double* diagonal;
  double* off_diagonal;
  int32_t* taken;
  int32_t* going;

  __device__ Run(const SpectralArgs& a, const SpectralEntry& entry, int probe)
      : e(entry),
        probe(probe),
        basis(a.floats + entry.basis + probe * entry.length),
        w(a.floats + entry.sums + probe * entry.length),
        stride(kProbes * entry.length),
        diagonal(a.diagonal + (entry.run + probe) * a.steps),
        off_diagonal(a.off_diagonal + (entry.run + probe) * a.steps),
        taken(a.taken + entry.run + probe),
        going(a.going + entry.run + probe) {}

  // The random number or given number that q_0 has at a place.
  __device__ float start_at(const SpectralArgs& a, int64_t place) const {
    if (a.given != nullptr) return a.given[e.given + probe * e.length + place];
    const int column = e.first_probe + probe;
    const uint32_t draw = a.draw + (a.replays != nullptr ? *a.replays : 0);
    const Philox bits = Stream{a.seed, e.name, Purpose::probe, draw}.bits(
        static_cast<uint64_t>(e.element + place), static_cast<uint32_t>(column / 128));
    uint32_t word = bits.word[0];  // an index would put them into local memory
#pragma unroll
    for (int i = 1; i < 4; ++i) word = column % 128 / 32 == i ? bits.word[i] : word;
    return (word >> (column % 32) & 1u) != 0 ? -1.0f : 1.0f;
  }

  __device__ void start(const SpectralArgs& a) const {
    float square = 0;
#pragma unroll 1
    for (int64_t k = threadIdx.x; k < e.length; k += kThreads) {
      const float v = start_at(a, k);
      basis[k] = v;
      square += v * v;
    }
    const double norm = sqrt(block_sum(square));
    const double factor = a.mode == SpectralMode::product || !(norm > 0) ? 1 : 1 / norm;
#pragma unroll 1
    for (int64_t k = threadIdx.x; k < e.length; k += kThreads) {
      basis[k] = static_cast<float>(basis[k] * factor);
    }
    if (threadIdx.x == 0) {
      *taken = 0;
      *going = 1;
    }
  }

  // y of all slices, in order.
  __device__ float sum_at(const SpectralArgs& a, double scale, int64_t place) const {
    const float* part = a.floats + e.partials + probe * e.length + place;
    float sum = 0;
    for (int32_t slice = 0; slice < e.slices; ++slice) sum += __ldcg(part + slice * stride);
    return static_cast<float>(sum * scale);
  }

  // i times a complex vector, (re, im) interleaved; or the vector itself.
  __device__ static float turned_at(const float* q, bool turned, int64_t place) {
    if (!turned) return q[place];
    return place % 2 == 0 ? -q[place + 1] : q[place - 1];
  }

  // w -= (sum over i < count) q_i (q_i . w), by classical Gram-Schmidt.
  __device__ void project_out(int64_t count, bool turned, float* products) const {
    __syncthreads();
    for (int64_t i = warp_index(); i < count; i += kWarps) {
      const float* q = basis + i * stride;
      float sum = 0;
#pragma unroll 4
      for (int64_t k = lane_index(); k < e.length; k += kLanes) {
        sum += turned_at(q, turned, k) * w[k];
      }
      const double total = warp_sum(static_cast<double>(sum));
      if (lane_index() == 0) products[i] = static_cast<float>(total);
    }
    __syncthreads();
#pragma unroll 1
    for (int64_t k = threadIdx.x; k < e.length; k += kThreads) {
      float v = w[k];
      for (int64_t i = 0; i < count; ++i) {
        v -= products[i] * turned_at(basis + i * stride, turned, k);
      }
      w[k] = v;
    }
  }

  // Step j. `products`: shared memory for j + 1 numbers. False if the run ends.
  __device__ bool advance(const SpectralArgs& a, int64_t j, bool last, double scale,
                          float* products) const {
    const float* q = basis + j * stride;
    if (e.path == Path::convert) scale = 1;  // W was scaled as it was read, both times
    float sum = 0;
#pragma unroll 1
    for (int64_t k = threadIdx.x; k < e.length; k += kThreads) {
      const float y = sum_at(a, scale, k);
      w[k] = y;
      sum += q[k] * y;
    }
    const double alpha = block_sum(sum);
    if (threadIdx.x == 0) {
      diagonal[j] = alpha;
      *taken = static_cast<int32_t>(j + 1);
    }
    if (last) return false;
    const double beta = j > 0 ? off_diagonal[j - 1] : 0;
#pragma unroll 1
    for (int64_t k = threadIdx.x; k < e.length; k += kThreads) {
      float v = w[k] - static_cast<float>(alpha) * q[k];
      if (j > 0) v -= static_cast<float>(beta) * (q - stride)[k];
      w[k] = v;
    }
    // Every eigenvalue of a complex matrix has a second eigenvector, i times the first: rounding
    // must not let it in.
    const int turns = is_complex(e.dtype) ? 2 : 1;
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) project_out(j + 1, turn == 1, products);
    float square = 0;
#pragma unroll 1
    for (int64_t k = threadIdx.x; k < e.length; k += kThreads) square += w[k] * w[k];
    const double norm = sqrt(block_sum(square));
    double largest = fabs(alpha) + beta;
    for (int64_t i = 0; i < j; ++i) {
      const double row = fabs(diagonal[i]) + (i > 0 ? off_diagonal[i - 1] : 0);
      largest = row > largest ? row : largest;
    }
    const bool goes_on = norm > kInvariant * largest;
    float* next = basis + (j + 1) * stride;
#pragma unroll 1
    for (int64_t k = threadIdx.x; k < e.length && goes_on; k += kThreads) {
      next[k] = static_cast<float>(w[k] * (1 / norm));
    }
    if (threadIdx.x == 0) off_diagonal[j] = norm;
    return goes_on;
  }
};

// Whether what the first step has seen of an entry suits float.
__device__ inline bool in_range(const SpectralArgs& a, const SpectralEntry& e) {
  double largest = 0;
  for (int p = 0; p < e.probes; ++p) {
    const double mean = a.diagonal[(e.run + p) * a.steps];
    if (!is_finite(mean)) return false;
    largest = mean > largest ? mean : largest;
  }
  return largest > kSmallestMean && largest < kLargestMean;
}

}  // namespace tb::gpu
