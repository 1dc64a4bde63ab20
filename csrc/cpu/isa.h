// The loops that are compiled once per instruction set, and the table that picks one.
#pragma once

#include <cstdint>

namespace tb {

// max_j |1 - exp((1 - alpha)(logs[j] - logs[0])) - j / n| over 0 <= j < n, or some value above
// `bound` as soon as the maximum is known to exceed it.
//   logs: n ascending logarithms
using KsDistance = double (*)(const double* logs, int64_t n, double alpha, double bound);

struct Kernels {
  const char* isa;
  KsDistance ks_distance;
};

// The table for the instruction set in use; see tb::isa().
const Kernels& kernels();

namespace scalar {
double ks_distance(const double* logs, int64_t n, double alpha, double bound);
}
namespace avx2 {
double ks_distance(const double* logs, int64_t n, double alpha, double bound);
}
namespace avx512 {
double ks_distance(const double* logs, int64_t n, double alpha, double bound);
}

}  // namespace tb
