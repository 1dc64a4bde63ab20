// Every kernel on a small ragged problem, for the sanitizers: all memory has exactly the size that
// a kernel may use, and holds NaN before. Values are tested elsewhere; here they must be finite.
//
//   kernels_test names             the kernels
//   kernels_test NAME SEED         "right", "wrong" or the fault that was found
#include <cmath>
#include <complex>
#include <cstdio>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "cuda/fit.h"
#include "cuda/inner_step.h"
#include "cuda/rsvd_step.h"
#include "cuda/spectral_step.h"
#include "emulated_runtime.h"

namespace {

using namespace tb;
using namespace tb::gpu;

constexpr int kBlocks = 2;
constexpr int64_t kAnyBlocks = 0;

// Numbers that a kernel reads or writes.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : size_(size), memory_(simt::poisoned(static_cast<size_t>(size) * sizeof(T))) {}
  explicit Buffer(const std::vector<T>& values) : Buffer(static_cast<int64_t>(values.size())) {
    std::copy(values.begin(), values.end(), begin());
  }

  T* begin() const { return reinterpret_cast<T*>(memory_.get()); }
  T* end() const { return begin() + size_; }
  uintptr_t address() const { return reinterpret_cast<uintptr_t>(memory_.get()); }

  bool finite() const {
    return std::all_of(begin(), end(), [](T v) { return std::isfinite(v); });
  }

 private:
  int64_t size_;
  simt::Memory memory_;
};

// Memory of a plan, with its tables.
template <typename Plan>
Buffer<unsigned char> workspace_of(const Plan& plan) {
  Buffer<unsigned char> workspace(plan.workspace_bytes());
  std::copy(plan.image().begin(), plan.image().end(), workspace.begin());
  return workspace;
}

class Normal {
 public:
  explicit Normal(unsigned seed) : bits_(seed) {}
  double operator()() { return normal_(bits_); }
  std::vector<float> floats(int64_t count) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& v : values) v = static_cast<float>((*this)());
    return values;
  }

 private:
  std::mt19937 bits_;
  std::normal_distribution<double> normal_;
};

void set(__half& to, double re, double) { to = __float2half_rn(static_cast<float>(re)); }
void set(__nv_bfloat16& to, double re, double) { to = __float2bfloat16_rn(static_cast<float>(re)); }
void set(float& to, double re, double) { to = static_cast<float>(re); }
void set(double& to, double re, double) { to = re; }
void set(float2& to, double re, double im) {
  to = {static_cast<float>(re), static_cast<float>(im)};
}
void set(double2& to, double re, double im) { to = {re, im}; }

// Layers of one matrix each.
class Weights {
 public:
  void add(int64_t rows, int64_t cols, DType dtype, bool columns_contiguous = false) {
    const int64_t bytes = rows * cols * element_bytes(dtype);
    memory_.push_back(simt::poisoned(static_cast<size_t>(bytes)));
    void* data = memory_.back().get();
    switch (dtype) {
      case DType::f16:
        fill(static_cast<__half*>(data), rows * cols);
        break;
      case DType::bf16:
        fill(static_cast<__nv_bfloat16*>(data), rows * cols);
        break;
      case DType::f32:
        fill(static_cast<float*>(data), rows * cols);
        break;
      case DType::f64:
        fill(static_cast<double*>(data), rows * cols);
        break;
      case DType::c64:
        fill(static_cast<float2*>(data), rows * cols);
        break;
      case DType::c128:
        fill(static_cast<double2*>(data), rows * cols);
        break;
    }
    const auto layer = static_cast<int64_t>(matrices.size());
    matrices.push_back({data, rows, cols, columns_contiguous ? 1 : cols,
                        columns_contiguous ? rows : 1, dtype, layer, 0});
    names.push_back(static_cast<uint32_t>(layer) * 0x9E3779B9u);
  }

  int64_t layers() const { return static_cast<int64_t>(matrices.size()); }

  std::vector<Matrix> matrices;
  std::vector<uint32_t> names;

 private:
  template <typename T>
  void fill(T* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) set(to[i], normal_(), normal_());
  }

  std::vector<simt::Memory> memory_;
  Normal normal_{1};
};

// Each type; rows and columns contiguous, aligned or not; and a layer that several blocks share: it
// has more rows than a slice, more columns than a segment and more elements than a tile.
Weights ragged() {
  Weights w;
  for (const DType t : {DType::f16, DType::bf16, DType::f32, DType::f64, DType::c64, DType::c128}) {
    w.add(19, 33, t);
    w.add(40, 24, t, true);
  }
  w.add(272, 264, DType::bf16);
  w.add(1, 9, DType::f32);
  return w;
}

FitOptions options_of(FitKind kind) {
  FitOptions options;
  options.kind = kind;
  options.k = 8;
  return options;
}

constexpr FitKind kKinds[] = {FitKind::median, FitKind::ks, FitKind::peak, FitKind::tail};

bool spectral_product() {
  const Weights w = ragged();
  constexpr int64_t kStarts = 9;  // more than one pass serves
  const SpectralStep plan(w.matrices, w.names, kStarts, 1, options_of(FitKind::median), 1 << 30);
  int64_t size = 0;
  for (const Matrix& m : w.matrices) size += kStarts * m.length();
  const Buffer<float> given(Normal(2).floats(size)), out(size);
  const auto workspace = workspace_of(plan);
  SpectralCall call;
  call.product = true;
  call.given = given.address();
  call.out = out.address();
  plan.launch(call, workspace.address(), 0, kAnyBlocks);
  return out.finite();
}

bool spectral_alpha() {
  Weights w;
  w.add(24, 272, DType::bf16);
  w.add(24, 40, DType::f32, true);
  w.add(9, 7, DType::c64);
  const SpectralStep plan(w.matrices, w.names, 3, 4, options_of(FitKind::median), 1 << 30);
  const auto workspace = workspace_of(plan);
  const Buffer<double> out(w.layers() * kQuadratureColumns), finished(1);
  std::memset(workspace.begin() + plan.replays(), 0, sizeof(uint32_t));
  SpectralCall call;
  call.fit = true;
  call.replayed = true;
  call.out = out.address();
  call.finished = finished.address();
  call.sequence = 7;
  plan.launch(call, workspace.address(), 0, kAnyBlocks);
  plan.launch(call, workspace.address(), 0, kAnyBlocks);
  return *finished.begin() == 7 && std::isfinite(out.begin()[0]);
}

bool fit_all() {
  std::vector<double> values;
  std::vector<int64_t> offsets{0};
  Normal normal(3);
  for (const size_t n : {257u, 1u, 41u, 2u}) {
    std::vector<double> spectrum(n);
    for (double& v : spectrum) v = std::exp(normal());
    std::sort(spectrum.begin(), spectrum.end());
    values.insert(values.end(), spectrum.begin(), spectrum.end());
    offsets.push_back(static_cast<int64_t>(values.size()));
  }
  const Buffer<double> spectra(values);
  bool right = true;
  for (const FitKind kind : kKinds) {
    const FitPlan plan(offsets, options_of(kind));
    const auto workspace = workspace_of(plan);
    const Buffer<double> results(static_cast<int64_t>(offsets.size() - 1) * 6);
    plan.launch(spectra.address(), workspace.address(), results.address(), 0, kAnyBlocks);
    right = right && std::isfinite(results.begin()[0]);
  }
  return right;
}

bool quadrature() {
  constexpr int64_t kMatrices = 4, kRuns = 3, kSteps = 6;
  const std::vector<int64_t> first{0, 1, 4}, count{20, 20, 5, 5};
  Normal normal(4);
  std::vector<double> diagonal, off_diagonal;
  for (int64_t i = 0; i < kMatrices * kRuns * kSteps; ++i) {
    diagonal.push_back(4 + std::fabs(normal()));
    off_diagonal.push_back(0.5 + 0.1 * std::fabs(normal()));
  }
  const Buffer<double> d(diagonal), e(off_diagonal);
  std::vector<int> steps(kMatrices * kRuns, kSteps);
  steps[4] = 2;
  const Buffer<int> taken(steps);
  bool right = true;
  for (const FitKind kind : kKinds) {
    const QuadraturePlan plan(first, count, kRuns, kSteps, 1e-7, options_of(kind));
    const auto workspace = workspace_of(plan);
    const Buffer<double> results(static_cast<int64_t>(first.size() - 1) * kQuadratureColumns);
    plan.launch(d.address(), e.address(), taken.address(), workspace.address(), results.address(),
                0, kAnyBlocks);
    right = right && std::isfinite(results.begin()[0]);
  }
  return right;
}

bool rsvd() {
  Weights w;
  w.add(2056, 24, DType::bf16);  // several slices
  w.add(19, 33, DType::f32, true);
  w.add(12, 15, DType::c128);
  const RsvdStep plan(w.matrices, RsvdOptions{3, 3, 1, 0});
  const auto workspace = workspace_of(plan);
  const Buffer<unsigned char> factors(plan.factors_bytes());
  const Buffer<double> results(w.layers() * kRsvdResults);
  plan.launch(workspace.address(), factors.address(), results.address(), 11, 0, kAnyBlocks);
  return results.finite();
}

// Numbers of a matrix in a row, real ones.
int64_t width(const Matrix& m) { return m.cols * (is_complex(m.dtype) ? 2 : 1); }

bool dot() {
  const Weights w = ragged();
  int64_t numbers = 0, rows = 0;
  for (const Matrix& m : w.matrices) {
    numbers += m.rows * width(m);
    rows += m.rows;
  }
  const Buffer<int8_t> values(std::vector<int8_t>(static_cast<size_t>(numbers), 3));
  const Buffer<float> scales(Normal(5).floats(rows));
  const DotPlan plan(w.matrices, w.layers());
  const auto workspace = workspace_of(plan);
  const Buffer<double> results(w.layers() * kDotColumns);
  plan.launch(values.address(), scales.address(), workspace.address(), results.address(), 0,
              kAnyBlocks);
  return results.finite();
}

bool drift() {
  const Weights w = ragged();
  std::vector<int64_t> kept;
  int64_t numbers = 0, begin = 0;
  for (const Matrix& m : w.matrices) {
    for (int64_t row = 0; row < m.rows; row += 2) {
      kept.push_back(begin + row);
      numbers += width(m);
    }
    begin += m.rows;
  }
  const Buffer<float> values(Normal(6).floats(numbers));
  const DriftPlan plan(w.matrices, w.layers(), kept);
  const auto workspace = workspace_of(plan);
  const Buffer<double> results(w.layers() * kDriftColumns);
  plan.launch(values.address(), workspace.address(), results.address(), 0, kAnyBlocks);
  return results.finite();
}

const std::map<std::string, bool (*)()> kKernels = {
    {"spectral_product", spectral_product},
    {"spectral_alpha", spectral_alpha},
    {"fit", fit_all},
    {"quadrature", quadrature},
    {"rsvd", rsvd},
    {"dot", dot},
    {"drift", drift},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3) {
    emulation().schedule = std::stoull(argv[2]);
    emulation().device.multiprocessors = kBlocks;
    try {
      std::puts(kKernels.at(argv[1])() ? "right" : "wrong");
    } catch (const std::exception& e) {
      std::puts(e.what());
    }
    return 0;
  }
  for (const auto& kernel : kKernels) std::puts(kernel.first.c_str());
  return 0;
}
