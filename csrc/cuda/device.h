// What kernels are written in: CUDA C++ under nvcc; under any other compiler the same words, given
// their meaning by the emulator in tests/emulation/simt.h.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// A variable of the block; the memory that the launch gave it; what a waiting thread does.
#define TB_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
#define TB_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char tb_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(tb_dynamic_shared)
#define TB_SPIN() __nanosleep(32)
#else
#include "simt.h"

#define TB_SHARED SIMT_SHARED
#define TB_DYNAMIC_SHARED SIMT_DYN_SHARED
#define TB_SPIN SIMT_SPIN
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#endif

namespace tb::gpu {

// Every kernel has blocks of this many threads, on every device: the order of every sum in a block,
// and so every bit of a result, depends on it.
constexpr int kThreads = 256;
constexpr int kLanes = 32;
constexpr int kWarps = kThreads / kLanes;

// Blocks that a multiprocessor shall hold at once, for kernels that take about 50 KiB of shared
// memory or more: two hide each other's barriers, if there is room; then a thread has 128
// registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 1200
constexpr int kWantedBlocks = 1;  // of 100 KiB
#else
constexpr int kWantedBlocks = 2;
#endif

constexpr unsigned kAllLanes = 0xffffffffu;

// Waits for all threads of the grid, and makes visible what they wrote.
__device__ inline void grid_barrier() { cooperative_groups::this_grid().sync(); }

}  // namespace tb::gpu
