// t = T x of one panel, from what each warp of each block of the team has of it.
//
//   1. warp 0 adds up the warps of its block, in order;
//   2. it writes the sum to the slot of its segment, and says so by raising the team's counter;
//   3. it waits until all blocks of the team have raised it, and adds up the segments, in order.
//
// The counter only rises, so it needs no reset within a launch. A slot is written again two panels
// later: a block that is there has seen all others arrive at the panel in between, and none of them
// arrives before it has read the slot. All blocks of a team run at the same time: the items of a
// slice follow each other, every block takes its items in order, and there are no fewer blocks than
// segments.
#pragma once

#include "cuda/block.h"
#include "cuda/spectral_args.h"

namespace tb::gpu {

struct Team {
  float* slots;       // (kTeamSlots, segments, kPanel * kProbes)
  unsigned* arrived;  // counter
  int segments, segment;
  unsigned before;  // arrivals of this block in this launch, before this panel
};

__device__ inline Team team_of(const SpectralArgs& a, const SpectralEntry& e,
                               const SpectralItem& item, unsigned before) {
  constexpr int64_t kSlot = kPanel * kProbes;
  return {a.floats + e.exchange + item.slice * kTeamSlots * e.segments * kSlot,
          a.arrived + e.arrived + item.slice, e.segments, item.segment, before};
}

// For warp 0: lane l gets t of the probe l % kProbes and of kValues rows from (l / kProbes) *
// kValues on, kValues = rows of a panel / 4.
//   parts: (kParts, rows * kProbes), in shared memory
template <int kParts, int kValues>
__device__ inline void sum_of_team(const Team& team, const float* parts, float (&t)[kValues]) {
  constexpr int kSize = kValues * kLanes;
  constexpr int64_t kSlot = kPanel * kProbes;
  const int lane = lane_index();
  const int first = lane / kProbes * kValues * kProbes + lane % kProbes;
  for (int v = 0; v < kValues; ++v) {
    float sum = 0;
    for (int part = 0; part < kParts; ++part) sum += parts[part * kSize + first + v * kProbes];
    t[v] = sum;
  }
  if (team.segments == 1) return;
  float* slots = team.slots + team.before % kTeamSlots * team.segments * kSlot;
  for (int v = 0; v < kValues; ++v) slots[team.segment * kSlot + first + v * kProbes] = t[v];
  __threadfence();
  __syncwarp();
  if (lane == 0) {
    const unsigned all = (team.before + 1) * static_cast<unsigned>(team.segments);
    atomicAdd(team.arrived, 1u);
    while (atomicAdd(team.arrived, 0u) < all) TB_SPIN();
    __threadfence();
  }
  __syncwarp();
  for (int v = 0; v < kValues; ++v) {
    float sum = 0;
    for (int segment = 0; segment < team.segments; ++segment) {
      sum += __ldcg(slots + segment * kSlot + first + v * kProbes);
    }
    t[v] = sum;
  }
}

}  // namespace tb::gpu
