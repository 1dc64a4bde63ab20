// The passes of gram_bf16.h that this machine can run.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/isa.h"

namespace tb {

struct GramBf16Engine {
  const char* name;
  GramBf16Apply apply;

  // sums (16, 16) += rows (16, 32) times pairs (16, 32); either operand can be the shared one.
  void (*multiply)(const uint16_t* rows, const uint16_t* pairs, bool share_rows, float* sums);
};

// "amx" and "avx512bf16" where the machine has them, and emulations of both for tests.
const std::vector<GramBf16Engine>& gram_bf16_engines();

// The pass of an engine, or a null pointer where the machine cannot run it.
GramBf16Apply gram_bf16_engine(const char* name);

// Each in a file of its own, compiled for its machine.
extern const GramBf16Engine kEmulatedAmx, kEmulatedAvx512Bf16;
extern const GramBf16Engine kAmx, kAvx512Bf16, kEmulatedAmxAvx512;

}  // namespace tb
