#include "cpu/bf16.h"

#include <cstring>

#if defined(TB_BF16)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace tb {
namespace {

#if defined(TB_BF16)
// Registers of a leaf of CPUID, zero where the machine has none.
struct Leaf {
  unsigned a = 0, b = 0, c = 0, d = 0;
  Leaf(unsigned leaf, unsigned subleaf) { __get_cpuid_count(leaf, subleaf, &a, &b, &c, &d); }
};

bool bit(unsigned word, int place) { return (word >> place & 1u) != 0; }

// Whether the operating system saves the registers of all these state components.
bool saves(unsigned components) {
  if (!bit(Leaf(1, 0).c, 27)) return false;  // OSXSAVE
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & components) == components;
}

bool has_avx512bw() {
  const unsigned features = Leaf(7, 0).b;
  // F, DQ, BW, VL
  return saves(0xe6) && bit(features, 16) && bit(features, 17) && bit(features, 30) &&
         bit(features, 31);
}

bool has_avx512_bf16() { return has_avx512bw() && bit(Leaf(7, 1).a, 5); }

bool has_amx_bf16() {
  const unsigned features = Leaf(7, 0).d;
  if (!has_avx512bw() || !saves(3u << 17) || !bit(features, 22) || !bit(features, 24)) return false;
#if defined(__linux__)
  // Linux (5.16) lets a process use tiles when it has asked: ARCH_REQ_XCOMP_PERM, XTILEDATA.
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return true;
#endif
}
#endif

}  // namespace

const std::vector<GramBf16Engine>& gram_bf16_engines() {
  static const std::vector<GramBf16Engine> engines = [] {
    std::vector<GramBf16Engine> found{kEmulatedAmx, kEmulatedAvx512Bf16};
#if defined(TB_BF16)
    if (has_avx512bw()) found.push_back(kEmulatedAmxAvx512);
    if (has_avx512_bf16()) found.push_back(kAvx512Bf16);
    if (has_amx_bf16()) found.push_back(kAmx);
#endif
    return found;
  }();
  return engines;
}

GramBf16Apply gram_bf16_engine(const char* name) {
  for (const GramBf16Engine& engine : gram_bf16_engines()) {
    if (std::strcmp(engine.name, name) == 0) return engine.apply;
  }
  return nullptr;
}

}  // namespace tb
