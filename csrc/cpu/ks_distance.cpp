// Kolmogorov-Smirnov distance between a tail and its power law. Compiled once per instruction set:
// plain loops over blocks of lanes that the compiler turns into vectors. Nothing from the standard
// library's templates is used, so no code compiled for AVX-512 can be linked into the scalar path.
#include <cstdint>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/vec.h"

namespace tb {
namespace TB_ISA {
namespace {

constexpr int kLanes = 32;

// exp(x) for -700 <= x <= 0 with a relative error below 1e-15: x = k ln 2 + r, |r| <= ln 2 / 2,
// Taylor series of e^r to degree 13 (remainder 2e-18), then 2^k by the exponent bits.
inline double exp_nonpositive(double x) {
  constexpr double kLog2E = 1.4426950408889634;
  constexpr double kLn2High = 0.693147180369123816490;  // ln 2 to 32 bits
  constexpr double kLn2Low = 1.90821492927058770002e-10;
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer
  const double shifted = x * kLog2E + kShift;
  const double k = shifted - kShift;
  const double r = (x - k * kLn2High) - k * kLn2Low;
  double p = 1.0 / 6227020800.0;
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  int64_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  const int64_t exponent = static_cast<int64_t>((static_cast<uint64_t>(bits) + 1023u) << 52);
  double power;
  std::memcpy(&power, &exponent, sizeof(power));
  return p * power;
}

// The largest |1 - exp(slope (logs[j] - logs[0])) - j / n| over kLanes values of j, stride apart.
inline double worst_gap(const double* logs, int64_t n, double slope, int64_t first,
                        int64_t stride) {
  const double origin = logs[0];
  const double count = static_cast<double>(n);
  double gap[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const int64_t j = first + lane * stride;
    double x = slope * (logs[j] - origin);
    x = x < -700.0 ? -700.0 : x;
    const double d = 1.0 - exp_nonpositive(x) - static_cast<double>(j) / count;
    gap[lane] = d < 0 ? -d : d;
  }
  double worst = 0;
  for (int lane = 0; lane < kLanes; ++lane) worst = gap[lane] > worst ? gap[lane] : worst;
  return worst;
}

}  // namespace

double ks_distance(const double* logs, int64_t n, double alpha, double bound) {
  const double slope = 1 - alpha;
  double worst = 0;
  // A sample over the whole tail rules out most candidates.
  if (n > 4 * kLanes && (worst = worst_gap(logs, n, slope, 0, n / kLanes)) > bound) return worst;
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) {
    const double gap = worst_gap(logs, n, slope, j, 1);
    worst = gap > worst ? gap : worst;
    if (worst > bound) return worst;
  }
  for (; j < n; ++j) {
    double x = slope * (logs[j] - logs[0]);
    x = x < -700.0 ? -700.0 : x;
    const double d = 1.0 - exp_nonpositive(x) - static_cast<double>(j) / static_cast<double>(n);
    const double gap = d < 0 ? -d : d;
    worst = gap > worst ? gap : worst;
  }
  return worst;
}

}  // namespace TB_ISA
}  // namespace tb
