// Which model each element of a block comes from.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/merge_kernels.h"
#include "merge.h"

namespace tb {

constexpr int64_t kBlock =
    1 << 11;  // elements that are merged at a time: their floats stay in cache

// Random numbers below 2^32 of a block of elements, as far as they decide between bounds: of most
// elements the first byte does, the others get three more.
class Ranks {
 public:
  // bounds: ascending, each up to 2^32
  Ranks(const MergeKernels& kernels, const std::vector<uint64_t>& bounds);

  // rank()[j] = how many bounds are <= the random number of element first + j, j < n <= kBlock;
  // bounds of 2^32 do not count
  void draw(const DrawKey& key, uint64_t first, int64_t n);
  uint8_t* rank() { return rank_.data(); }

 private:
  const MergeKernels* kernels_;
  std::vector<uint64_t> bounds_;
  std::vector<uint8_t> least_;  // first bytes from which on a bound is passed for certain
  std::vector<uint8_t> close_;  // first bytes that do not tell
  std::vector<uint8_t> bytes_, rank_;
};

// Parameter selection: each element from one model, drawn by weight; with a base, a draw that
// equals it is made again.
class Picks {
 public:
  Picks(const Merge& what, const MergeKernels& kernels);

  // changed: of n elements, bit i set where model i differs from the base; or null
  // place: of the first element, in the whole tensor
  void draw(const uint32_t* changed, uint64_t place, int64_t n);
  const uint8_t* pick() { return first_.rank(); }

 private:
  void redraw(const uint32_t* changed, uint64_t place, int64_t n);
  uint64_t share(size_t model, uint32_t among) const;

  const Merge* what_;
  const MergeKernels* kernels_;
  Ranks first_, again_;
  std::vector<uint32_t> words_;
};

}  // namespace tb
