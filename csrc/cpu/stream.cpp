// How fast this machine reads memory, and how fast it multiplies: what the other kernels are held
// against. Compiled once per instruction set.
#include <cstdint>

#include "cpu/isa.h"
#include "cpu/vec.h"

namespace tb {
namespace TB_ISA {
namespace {

// Places in memory read in turn, each into a sum of its own: the prefetchers of the processor
// follow several streams, and did better with eight than with one, or than any prefetch
// instruction.
constexpr int kStreams = 8;
constexpr int kChains = 12;  // independent chains: two multipliers, six cycles at most

}  // namespace

uint64_t stream_sum(const uint64_t* words, int64_t n) {
  using V = Vec<uint64_t>;
  V sums[kStreams];
  for (V& s : sums) s = V::zero();
  const int64_t part = n / (kStreams * V::size) * V::size;
  for (int64_t i = 0; i < part; i += V::size) {
    for (int s = 0; s < kStreams; ++s) sums[s] = sums[s] + V::load(words + s * part + i);
  }
  uint64_t total = 0;
  for (const V& s : sums) total += s.sum();
  for (int64_t i = kStreams * part; i < n; ++i) total += words[i];
  return total;
}

double fma_chains(int64_t steps) {
  using V = Vec<float>;
  V chains[kChains];
  for (V& c : chains) c = V::zero();
  const V half = V::fill(0.5f), one = V::fill(1);
  for (int64_t step = 0; step < steps; ++step) {
    for (V& c : chains) {
      V next = one;
      next.add_product(c, half);
      c = next;
    }
  }
  double total = 0;
  for (const V& c : chains) total += static_cast<double>(c.sum());
  return total;
}

int64_t fma_flops_per_step() { return int64_t{2} * kChains * Vec<float>::size; }

}  // namespace TB_ISA
}  // namespace tb
