// One chunk of a tensor, merged block by block in memory.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/isa.h"
#include "cpu/merge_kernels.h"
#include "cpu/merge_picks.h"
#include "merge.h"

namespace tb {

constexpr int64_t kChunk = 1 << 16;  // elements that are read at a time

// What a method has to know of a whole tensor before it can merge any of it.
struct Whole {
  std::vector<double> threshold;  // TIES: the smallest magnitude that is kept, of each model
  std::vector<double> factor;     // DARE: what the kept elements of each model are multiplied by
  std::vector<double> weight;     // SLERP and linear: what each model is multiplied by
};

// The bytes of a chunk of every input: read, or where they are if that is in memory.
class ChunkInputs {
 public:
  // Throws MergeFault.
  void load(const Merge& what, int64_t tensor, int64_t first, int64_t count);
  const char* input(size_t i) const { return begins_[i]; }

 private:
  std::vector<const char*> begins_;  // of the models, then of the base
  std::vector<std::vector<char>> bytes_;
};

// The chunk's differences to the base, as numbers, block by block.
template <typename T>
class Deltas {
 public:
  Deltas(const Merge& what, const Kernels& isa, const ChunkInputs& inputs)
      : what_(what), isa_(isa), inputs_(inputs), drops_(isa.merge, {keep_bound(what)}) {}

  // to[j] = number j of input i, from element `at` of the chunk on
  void decode(size_t i, int64_t at, int64_t n, T* to) const;
  // x = model i - base, and what DARE drops is 0; place: of the first element in the whole tensor
  void delta(size_t i, const T* base, int64_t at, int64_t n, uint64_t place, double factor, T* x);

 private:
  static uint64_t keep_bound(const Merge& what);
  const Merge& what_;
  const Kernels& isa_;
  const ChunkInputs& inputs_;
  Ranks drops_;
};

// Merges elements first .. first + count of `what`, which `inputs` holds.
Merged merge_chunk(const Merge& what, const Whole& whole, const Kernels& isa,
                   const ChunkInputs& inputs, int64_t first, int64_t count, char* out);

template <typename T>
const MergeArithmetic<T>& arithmetic(const Kernels& isa);

// Whether numbers are double: where an input or the output is.
bool needs_double(const Merge& what);

}  // namespace tb
