#include "cuda/rsvd_step.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "cuda/rsvd_step.cuh"

namespace tb::gpu {
namespace {

// Shared memory of whichever phase needs most.
constexpr int64_t shared_bytes() {
  return std::max({kSmallBytes, int64_t{sizeof(Tile<float>::Shared)},
                   int64_t{sizeof(Tile<double>::Shared)},
                   int64_t{sizeof(Tile<Complex<float>>::Shared)},
                   int64_t{sizeof(Tile<Complex<double>>::Shared)},
                   int64_t{sizeof(GramShared<Complex<double>>)}});
}

}  // namespace

RsvdStep::RsvdStep(const std::vector<Matrix>& matrices, const RsvdOptions& options)
    : rank_(options.rank), plan_(matrices, options) {
  entries_ = arena_.put(plan_.entries);
  for (int side = 0; side < kSides; ++side) {
    products_[side] = arena_.put(plan_.products[side]);
    tiles_[side] = arena_.put(plan_.tiles[side]);
    grams_[side] = arena_.put(plan_.grams[side]);
  }
  shifts_ = arena_.put(plan_.shifts);
  states_ = arena_.take<RsvdState>(static_cast<int64_t>(plan_.entries.size()));
  memory_ = arena_.take<unsigned char>(plan_.memory);
}

void RsvdStep::launch(uintptr_t workspace, uintptr_t factors, uintptr_t results, uint64_t seed,
                      uintptr_t stream, int64_t blocks) const {
  if (plan_.entries.empty()) return;
  const int64_t resident = resident_blocks(rsvd_step, shared_bytes());
  if (blocks == 0) blocks = std::min(resident, most_blocks());
  if (blocks < 1 || blocks > resident) {
    throw std::invalid_argument("the device runs 1 to " + std::to_string(resident) +
                                " blocks of this kernel at once; asked for " +
                                std::to_string(blocks));
  }
  const auto at = [&](int64_t offset) {
    return reinterpret_cast<void*>(workspace + static_cast<uintptr_t>(offset));
  };
  const auto table = [&](int64_t offset, const std::vector<RsvdItem>& items) {
    return RsvdTable{static_cast<const RsvdItem*>(at(offset)), static_cast<int32_t>(items.size())};
  };
  RsvdArgs a{};
  a.entries = static_cast<const RsvdEntry*>(at(entries_));
  a.states = static_cast<RsvdState*>(at(states_));
  a.matrices = static_cast<int32_t>(plan_.entries.size());
  for (int side = 0; side < kSides; ++side) {
    a.products[side] = table(products_[side], plan_.products[side]);
    a.tiles[side] = table(tiles_[side], plan_.tiles[side]);
    a.grams[side] = table(grams_[side], plan_.grams[side]);
    a.sliced[side] = plan_.sliced[side];
  }
  a.shifts = static_cast<const double*>(at(shifts_));
  a.iterations = static_cast<int32_t>(plan_.shifts.size());
  a.rank = rank_;
  a.seed = seed;
  a.memory = static_cast<unsigned char*>(at(memory_));
  a.factors = reinterpret_cast<unsigned char*>(factors);
  a.results = reinterpret_cast<double*>(results);
  tb::gpu::launch(rsvd_step, static_cast<int>(blocks), shared_bytes(), a, stream);
}

}  // namespace tb::gpu
