#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/bf16.h"
#include "kernels.h"

#if defined(TB_X86) && defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#endif

namespace tb {
namespace {

#if defined(TB_X86) && defined(_MSC_VER)
bool has_avx2() {
  int leaf1[4], leaf7[4];
  __cpuid(leaf1, 1);
  __cpuidex(leaf7, 7, 0);
  const bool saved = (leaf1[2] & (1 << 27)) && (_xgetbv(0) & 0x6) == 0x6;
  return saved && (leaf1[2] & (1 << 12)) && (leaf7[1] & (1 << 5));
}
bool has_avx512() {
  int leaf7[4];
  __cpuidex(leaf7, 7, 0);
  const int wanted =
      (1 << 16) | (1 << 17) | (1 << 30) | static_cast<int>(1u << 31);  // F, DQ, BW, VL
  return has_avx2() && (_xgetbv(0) & 0xe6) == 0xe6 && (leaf7[1] & wanted) == wanted;
}
#elif defined(TB_X86)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#define TB_KERNELS(isa)                                                                       \
  Kernels {                                                                                   \
    #isa, isa::ks_distance, isa::tridiagonalize_f32, isa::tridiagonalize_f64,                 \
        isa::tridiagonalize_hermitian, isa::inner_f32, isa::inner_f64, isa::movement_f32,     \
        isa::movement_f64, isa::panel_products, isa::panel_sums, isa::panel_accumulate,       \
        isa::convert, isa::convert_columns, isa::inner_product, isa::subtract_scaled,         \
        isa::scaled_copy, isa::project_out, isa::skinny_product_f32, isa::skinny_product_f64, \
        isa::square_sum_f32, isa::square_sum_f64, isa::jacobi_sweep, isa::stream_sum,         \
        isa::fma_chains, isa::fma_flops_per_step, isa::merge_kernels(),                       \
        isa::merge_arithmetic_f32(), isa::merge_arithmetic_f64()                              \
  }

const std::vector<Kernels>& available() {
  static const std::vector<Kernels> found = [] {
    std::vector<Kernels> table{TB_KERNELS(scalar)};
#if defined(TB_X86)
    if (has_avx2()) table.push_back(TB_KERNELS(avx2));
    if (has_avx512()) {
      table.push_back(TB_KERNELS(avx512));
      table.back().gram_bf16 = gram_bf16_engine("avx512bf16");
      if (const GramBf16Apply pass = gram_bf16_engine("amx")) {
        table.push_back(TB_KERNELS(avx512));
        table.back().isa = "amx";
        table.back().gram_bf16 = pass;
      }
    }
#endif
    return table;
  }();
  return found;
}

}  // namespace

std::vector<const char*> available_isas() {
  std::vector<const char*> names;
  for (const Kernels& entry : available()) names.push_back(entry.isa);
  return names;
}

const Kernels& kernels() {
  // Read at every call: a getenv is nothing beside a fit, and tests switch it in one process.
  const char* wanted = std::getenv("TBFAST_ISA");
  if (wanted == nullptr || *wanted == '\0' || std::strcmp(wanted, "auto") == 0) {
    return available().back();
  }
  std::string known = "auto";
  for (const Kernels& entry : available()) {
    if (std::strcmp(entry.isa, wanted) == 0) return entry;
    known += std::string(", ") + entry.isa;
  }
  throw std::invalid_argument("TBFAST_ISA must be one of " + known + " on this machine, got '" +
                              wanted + "'");
}

const char* isa() { return kernels().isa; }

}  // namespace tb
