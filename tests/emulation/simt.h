// Runs CUDA kernels on the CPU, with the threads, blocks and barriers of the real ones, to find
// their faults where there is no GPU. Plain sources: they write SIMT_SHARED(float, a, [64]) for
// `__shared__ float a[64]`, SIMT_DYN_SHARED(float, a) for the memory that the launch gives, and
// SIMT_SPIN() in loops that wait; csrc/cuda/device.h makes CUDA of that under nvcc.
//
// Every CUDA thread is a fiber with a stack of its own. All threads of all blocks are alive at
// once, as in a cooperative launch, so blocks may wait for each other. One fiber runs at a time and
// gives way only where it synchronises, so a run can be repeated. Which one is next:
//
//   Options::seed = 0   in order: block 0, thread 0 first. It hides faults.
//   other seeds         at random
//
// Found in any run (simt::fault): deadlock, and who waits where; a loop that waits for ever;
// threads of a block at different barriers, or gone while others wait; lanes that disagree about a
// warp operation; overflow of a stack. In random order: a missing barrier, as results that are
// wrong or NaN, with which shared memory is filled at the start. With -fsanitize=address: accesses
// out of bounds, of shared memory too. With -fsanitize=thread: races between threads, in any order;
// only barriers, and atomics between fences, order what threads do, not shuffles and votes, as in
// CUDA.
//
// Stricter than a GPU: a thread may not return while others wait for its block, and volatile reads
// of what another thread writes are races. Not covered: weak memory beyond these races, and time.
#pragma once

#include "simt_fiber.h"
#include "simt_language.h"
#include "simt_numbers.h"
#include "simt_scheduler.h"
#include "simt_sync.h"
