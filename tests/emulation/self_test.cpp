// Tests of the emulator itself, for tests/test_emulation.py.
//
//   self_test faulty|sound NAME FIRST LAST   outcomes of a planted fault for these seeds, by line
//   self_test names                          the planted faults
//   self_test intrinsics|fragments           "right" or what is wrong
//   self_test round                          float32 from stdin, as float16 and bfloat16 to stdout
//   self_test widen                          all float16 and all bfloat16 as float32 to stdout
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>

#include "fragments.h"
#include "planted_faults.h"

namespace {

// Two blocks of two warps and a half; bit k of out is set if check k fails.
__global__ void intrinsics(int* out) {
  constexpr unsigned kFull = 0xffffffffu;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int lanes = thread < 64 ? 32 : 16;
  const unsigned odd = lanes == 32 ? 0xaaaaaaaau : 0xaaaau;
  int check = 0, failed = 0;
  const auto expect = [&](bool holds) { failed |= holds ? 0 : 1 << check, ++check; };
  expect(__ballot_sync(kFull, lane % 2) == odd);
  expect(__any_sync(kFull, lane == 5) == 1 && __any_sync(kFull, lane == 99) == 0);
  expect(__all_sync(kFull, lane < lanes) == 1 && __all_sync(kFull, lane != 5) == 0);
  expect(__shfl_sync(kFull, lane, 3) == 3);
  expect(__shfl_sync(kFull, 2.5 * lane, 1, 4) == 2.5 * (lane / 4 * 4 + 1));
  expect(__shfl_xor_sync(kFull, lane, 9) == (lane ^ 9));
  expect(__shfl_up_sync(kFull, lane, 2, 8) == (lane % 8 < 2 ? lane : lane - 2));
  expect(__shfl_down_sync(kFull, lane, 1, 16) == (lane % 16 == 15 ? lane : lane + 1));
  const float absent = __shfl_sync(kFull, 1.0f, 20);
  expect(lanes == 32 ? absent == 1 : isnan(absent));
  if (lane < 8) {
    expect(__shfl_xor_sync(0xffu, lane, 3) == (lane ^ 3));
  } else {
    expect(__shfl_xor_sync(kFull << 8, lane, 1) == (lane ^ 1));
  }
  expect(__syncthreads_count(thread < 5) == 5);
  expect(__syncthreads_or(thread == 70) == 1 && __syncthreads_or(0) == 0);
  expect(__syncthreads_and(1) == 1 && __syncthreads_and(thread != 70) == 0);
  expect(blockDim.x == 80 && gridDim.x == 2 && blockIdx.x < 2);
  if (atomicCAS(out + 1, 0, 7) == 0) atomicAdd(out + 2, 1);  // one thread of all
  atomicMax(out + 3, thread);
  atomicMin(out + 4, -thread);
  tb::gpu::grid_barrier();
  expect(out[1] == 7 && out[2] == 1 && out[3] == 79 && out[4] == -79);
  atomicOr(out, failed);
  atomicAdd(out + 5, check);
}

std::string intrinsics_outcome() {
  for (uint64_t seed = 0; seed < 10; ++seed) {
    int out[6] = {};
    simt::Options options;
    options.seed = seed;
    SIMT_LAUNCH(intrinsics, dim3(2), dim3(80), 0, options, out);
    if (out[0] != 0 || out[5] != 160 * 15) {
      return "seed " + std::to_string(seed) + ", failed checks: " + std::to_string(out[0]);
    }
  }
  return "right";
}

std::string fragments_outcome() {
  for (unsigned seed = 1; seed <= 20; ++seed) {
    if (!fragments::mma_is_right<__nv_bfloat16>(seed)) return "mma of bfloat16 is wrong";
    if (!fragments::mma_is_right<__half>(seed)) return "mma of float16 is wrong";
    if (!fragments::ldmatrix_is_right(seed)) return "ldmatrix is wrong";
  }
  return "right";
}

void round_numbers() {
  float v;
  while (std::fread(&v, sizeof(v), 1, stdin) == 1) {
    const uint16_t both[] = {__float2half_rn(v).bits, __float2bfloat16_rn(v).bits};
    std::fwrite(both, sizeof(both), 1, stdout);
  }
}

void widen_numbers() {
  for (uint32_t bits = 0; bits < 1u << 16; ++bits) {
    const auto b = static_cast<uint16_t>(bits);
    const float both[] = {__half2float({b}), __bfloat162float({b})};
    std::fwrite(both, sizeof(both), 1, stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string command = argc > 1 ? argv[1] : "";
  if (command == "intrinsics") return std::puts(intrinsics_outcome().c_str()), 0;
  if (command == "fragments") return std::puts(fragments_outcome().c_str()), 0;
  if (command == "round") return round_numbers(), 0;
  if (command == "widen") return widen_numbers(), 0;
  for (const planted::Kernel& kernel : planted::kKernels) {
    if (command == "names") std::puts(kernel.name);
    if (argc != 5 || std::strcmp(argv[2], kernel.name) != 0) continue;
    const auto run = command == "faulty" ? kernel.faulty : kernel.sound;
    for (uint64_t seed = std::stoull(argv[3]); seed <= std::stoull(argv[4]); ++seed) {
      std::puts(planted::outcome(run, seed).c_str());
    }
  }
  return 0;
}
