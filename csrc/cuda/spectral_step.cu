#include "cuda/spectral_step.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "cuda/spectral_step.cuh"

namespace tb::gpu {
namespace {

std::vector<int64_t> first_matrices(const std::vector<Matrix>& matrices, size_t layers) {
  std::vector<int64_t> first(layers + 1, 0);
  for (const Matrix& m : matrices) ++first[static_cast<size_t>(m.layer) + 1];
  std::partial_sum(first.begin(), first.end(), first.begin());
  return first;
}

std::vector<int64_t> counts(const std::vector<Matrix>& matrices) {
  std::vector<int64_t> count;
  for (const Matrix& m : matrices) count.push_back(m.count());
  return count;
}

// Shared memory: of the products, and room for the inner products of an advance.
int64_t shared_bytes(int64_t steps) {
  return std::max(static_cast<int64_t>(sizeof(SpectralShared)),
                  steps * static_cast<int64_t>(sizeof(float)));
}

}  // namespace

SpectralStep::SpectralStep(const std::vector<Matrix>& matrices, const std::vector<uint32_t>& names,
                           int64_t probes, int64_t steps, const FitOptions& options, int64_t memory)
    : plan_(matrices, names, probes, steps, memory),
      quadrature_(first_matrices(matrices, names.size()), counts(matrices), probes, steps,
                  kFloatEps, options) {
  entries_ = arena_.put(plan_.entries);
  items_ = arena_.put(plan_.items);
  rounds_ = arena_.put(plan_.rounds);
  replays_ = arena_.put(std::vector<uint32_t>{0});
  quadrature_.put_tables(arena_);
  quadrature_.take_scratch(arena_);
  const auto runs = static_cast<int64_t>(matrices.size()) * probes;
  floats_ = arena_.take<float>(plan_.floats);
  arrived_ = arena_.take<unsigned>(plan_.counters);
  going_ = arena_.take<int32_t>(runs);
  scale_ = arena_.take<double>(static_cast<int64_t>(plan_.entries.size()));
  diagonal_ = arena_.take<double>(runs * steps);
  off_diagonal_ = arena_.take<double>(runs * steps);
  taken_ = arena_.take<int32_t>(runs);
}

void SpectralStep::launch(const SpectralCall& call, uintptr_t workspace, uintptr_t stream,
                          int64_t blocks) const {
  if (plan_.entries.empty()) return;
  const int64_t shared = shared_bytes(plan_.steps);
  const int64_t resident = resident_blocks(spectral_step, shared);
  if (blocks == 0) blocks = std::min<int64_t>(resident, std::max(most_blocks(), least_blocks()));
  if (blocks < least_blocks() || blocks > resident) {
    throw std::invalid_argument("a matrix of this batch needs " + std::to_string(least_blocks()) +
                                " blocks at once and the device runs at most " +
                                std::to_string(resident) + "; asked for " + std::to_string(blocks));
  }
  const auto at = [&](int64_t offset) {
    return reinterpret_cast<void*>(workspace + static_cast<uintptr_t>(offset));
  };
  SpectralArgs a{};
  a.entries = static_cast<const SpectralEntry*>(at(entries_));
  a.items = static_cast<const SpectralItem*>(at(items_));
  a.rounds = static_cast<const SpectralRound*>(at(rounds_));
  a.round_count = static_cast<int32_t>(plan_.rounds.size());
  a.mode = call.product ? SpectralMode::product
                        : (call.fit ? SpectralMode::alpha : SpectralMode::lanczos);
  a.steps = plan_.steps;
  a.floats = static_cast<float*>(at(floats_));
  a.arrived = static_cast<unsigned*>(at(arrived_));
  a.going = static_cast<int32_t*>(at(going_));
  a.scale = static_cast<double*>(at(scale_));
  a.given = reinterpret_cast<const float*>(call.given);
  a.products = reinterpret_cast<float*>(call.product ? call.out : 0);
  a.seed = call.seed;
  a.draw = call.draw;
  a.replays = call.replayed ? static_cast<uint32_t*>(at(replays_)) : nullptr;
  a.diagonal = static_cast<double*>(at(diagonal_));
  a.off_diagonal = static_cast<double*>(at(off_diagonal_));
  a.taken = static_cast<int32_t*>(at(taken_));
  if (call.fit) {
    a.quadrature = quadrature_.args(workspace, a.diagonal, a.off_diagonal, a.taken,
                                    reinterpret_cast<double*>(call.out));
  }
  a.finished = reinterpret_cast<double*>(call.finished);
  a.sequence = call.sequence;
  tb::gpu::launch(spectral_step, static_cast<int>(blocks), shared, a, stream);
}

}  // namespace tb::gpu
