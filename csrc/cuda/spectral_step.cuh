// Alpha of every layer, in one launch: a cooperative grid that goes through all matrices in step.
//
//   for each round of matrices (one, where the memory suffices)
//     start vectors                                                    | grid barrier
//     for each Lanczos step
//       y = A x: blocks take the work items in turn                    | grid barrier
//       the next vector: blocks take the runs in turn                  | grid barrier
//     matrices whose numbers left the range of float start again, scaled by a power of two
//   Gauss quadrature, spectrum, fit and standard error of every layer
//
// Which block does what changes no bit of a result: a work item and a run are each the work of one
// block, or of one team, whose sums are in an order of their own.
#pragma once

#include "cuda/advance.cuh"
#include "cuda/apply_fma.cuh"
#include "cuda/apply_mma.cuh"
#include "cuda/quadrature.cuh"

namespace tb::gpu {

union SpectralShared {
  MmaShared<__nv_bfloat16> bf16;
  MmaShared<__half> f16;
  FmaShared fma;
  unsigned char quadrature[kQuadratureShared];
};

__device__ inline void apply_item(const SpectralArgs& a, const SpectralItem& item, int64_t step) {
  TB_DYNAMIC_SHARED(unsigned char, shared);
  const SpectralEntry& e = a.entries[item.entry];
  const double scale = a.scale[item.entry];
  const auto narrow = static_cast<float>(scale);
  auto& fma = *reinterpret_cast<FmaShared*>(shared);
  const bool is_bf16 = e.dtype == DType::bf16;
  switch (e.path) {
    case Path::mma:
      return is_bf16 ? apply_mma<__nv_bfloat16, false>(a, e, item, step, narrow)
                     : apply_mma<__half, false>(a, e, item, step, narrow);
    case Path::mma_transposed:
      return is_bf16 ? apply_mma<__nv_bfloat16, true>(a, e, item, step, narrow)
                     : apply_mma<__half, true>(a, e, item, step, narrow);
    case Path::fma:
      return apply_fma<Path::fma>(a, e, item, step, scale, fma);
    case Path::fma_transposed:
      return apply_fma<Path::fma_transposed>(a, e, item, step, scale, fma);
    case Path::convert:
      return apply_fma<Path::convert>(a, e, item, step, scale, fma);
  }
}

// Calls task(entry index, probe) for the runs of a round that are this block's turn.
template <typename Task>
__device__ inline void for_each_run(const SpectralArgs& a, int32_t r, Task task) {
  const SpectralRound& round = a.rounds[r];
  const int64_t count = int64_t{round.entry_end - round.entry_begin} * kProbes;
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const auto entry = static_cast<int32_t>(round.entry_begin + i / kProbes);
    const auto probe = static_cast<int>(i % kProbes);
    if (probe < a.entries[entry].probes) task(entry, probe);
  }
}

// What an entry needs before its first step; one block does it.
__device__ inline void begin(const SpectralArgs& a, int32_t entry, double scale) {
  const SpectralEntry& e = a.entries[entry];
  for (int slice = static_cast<int>(threadIdx.x); slice < e.slices; slice += kThreads) {
    a.arrived[e.arrived + slice] = 0;
  }
  if (threadIdx.x == 0) a.scale[entry] = scale;
}

__device__ inline bool any_going(const SpectralArgs& a, const SpectralEntry& e) {
  bool any = false;
  for (int p = 0; p < e.probes; ++p) any = any || a.going[e.run + p] != 0;
  return any;
}

// y = A x, or its slices, for all entries of a round with a run that is going.
__device__ inline void apply_items(const SpectralArgs& a, int32_t r, int32_t step) {
  const SpectralRound& round = a.rounds[r];
  for (int32_t i = round.item_begin + static_cast<int32_t>(blockIdx.x); i < round.item_end;
       i += static_cast<int32_t>(gridDim.x)) {
    const SpectralItem& item = a.items[i];
    if (any_going(a, a.entries[item.entry])) apply_item(a, item, step);
  }
  grid_barrier();
}

// Whether an entry needs no scaling, or has it.
__device__ inline bool suits_float(const SpectralArgs& a, int32_t entry) {
  return a.scale[entry] != 1 || in_range(a, a.entries[entry]);
}

// Step j of the runs of a round that are going, after its product.
__device__ __noinline__ void advance_runs(const SpectralArgs& a, int32_t r, int32_t j) {
  TB_DYNAMIC_SHARED(float, products);
  for_each_run(a, r, [&](int32_t entry, int probe) {
    const SpectralEntry& e = a.entries[entry];
    const Run run(a, e, probe);
    if (*run.going == 0) return;
    const bool last = j + 1 == a.steps || j + 1 == e.cols;
    // What has left the range of float ends here, to start again.
    const bool goes_on =
        (j != 1 || suits_float(a, entry)) && run.advance(a, j, last, a.scale[entry], products);
    __syncthreads();
    if (threadIdx.x == 0 && !goes_on) *run.going = 0;
  });
  grid_barrier();
}

// Products instead of runs.
__device__ __noinline__ void write_products(const SpectralArgs& a, int32_t r) {
  for_each_run(a, r, [&](int32_t entry, int probe) {
    const Run run(a, a.entries[entry], probe);
    for (int64_t k = threadIdx.x; k < run.e.length; k += kThreads) {
      a.products[run.e.given + probe * run.e.length + k] = run.sum_at(a, 1, k);
    }
  });
  grid_barrier();
}

// The first vectors of all runs of a round.
__device__ __noinline__ void start_runs(const SpectralArgs& a, int32_t r) {
  for_each_run(a, r, [&](int32_t entry, int probe) {
    if (probe == 0) begin(a, entry, 1);
    Run(a, a.entries[entry], probe).start(a);
  });
  grid_barrier();
}

// The scale of a matrix of zeros, or of one that is not finite.
constexpr double kNothingToScale = 0;

// Restarts what has left the range of float, scaled; true if there is anything to run.
__device__ __noinline__ bool rescale(const SpectralArgs& a, int32_t r) {
  const SpectralRound& round = a.rounds[r];
  bool any = false;
  for (int32_t entry = round.entry_begin + static_cast<int32_t>(threadIdx.x);
       entry < round.entry_end; entry += kThreads) {
    any = any || !suits_float(a, entry);
  }
  if (__syncthreads_or(any) == 0) return false;
  grid_barrier();
  for (int32_t entry = round.entry_begin + static_cast<int32_t>(blockIdx.x);
       entry < round.entry_end; entry += static_cast<int32_t>(gridDim.x)) {
    const SpectralEntry& e = a.entries[entry];
    if (suits_float(a, entry)) continue;
    double top = 0;
    bool finite = true;
    for (int64_t i = threadIdx.x; i < e.rows * e.cols; i += kThreads) {
      const Element<double> z = load_element<double>(e, i / e.cols, i % e.cols, 1);
      const double size = fmax(fabs(z.re), fabs(z.im));
      finite = finite && is_finite(z.re) && is_finite(z.im);
      top = size > top ? size : top;
    }
    finite = __syncthreads_and(finite) != 0;
    top = block_max(top);
    if (finite && top > 0) {
      int exponent;
      frexp(top, &exponent);
      begin(a, entry, ldexp(1.0, exponent == 0 ? 1 : -exponent));  // never 1
      for (int p = 0; p < e.probes; ++p) Run(a, e, p).start(a);
    } else {
      if (threadIdx.x == 0) a.scale[entry] = kNothingToScale;
      if (static_cast<int>(threadIdx.x) < e.probes) {
        const int64_t run = e.run + threadIdx.x;
        a.diagonal[run * a.steps] = finite ? 0 : nan("");
        a.taken[run] = 1;
      }
    }
  }
  grid_barrier();
  return true;
}

// Undoes the scaling of the Jacobi matrices of a round.
__device__ __noinline__ void unscale(const SpectralArgs& a, int32_t r) {
  for_each_run(a, r, [&](int32_t entry, int probe) {
    const double scale = a.scale[entry];
    if (scale == 1 || scale == kNothingToScale) return;
    const Run run(a, a.entries[entry], probe);
    for (int64_t j = threadIdx.x; j < *run.taken; j += kThreads) {
      run.diagonal[j] /= scale * scale;
      if (j + 1 < *run.taken) run.off_diagonal[j] /= scale * scale;
    }
  });
  grid_barrier();
}

__global__ void __launch_bounds__(kThreads, kWantedBlocks)
    spectral_step(const __grid_constant__ SpectralArgs a) {
  const bool product = a.mode == SpectralMode::product;
  for (int32_t r = 0; r < a.round_count; ++r) {
    start_runs(a, r);
    // One loop for both, with one copy of apply_items: with two of them registers spill.
    do {
      for (int32_t j = 0; j < (product ? 1 : a.steps); ++j) {
        apply_items(a, r, j);
        product ? write_products(a, r) : advance_runs(a, r, j);
      }
    } while (!product && rescale(a, r));
    if (!product) unscale(a, r);
  }
  if (a.mode == SpectralMode::alpha) quadrature_phases(a.quadrature);
  if (a.finished == nullptr && a.replays == nullptr) return;
  __threadfence_system();
  grid_barrier();
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    if (a.replays != nullptr) *a.replays = *a.replays + 1;
    if (a.finished != nullptr) *a.finished = a.sequence;
  }
}

}  // namespace tb::gpu
