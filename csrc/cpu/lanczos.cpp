#include "lanczos.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>

#include "cpu/block.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/product.h"
#include "cpu/schedule.h"
#include "cpu/workspaces.h"

namespace tb {

std::shared_ptr<Workspaces> make_workspaces() { return std::make_shared<Workspaces>(); }
int64_t workspace_bytes(const Workspaces& workspaces) { return workspaces.bytes(); }

namespace {

constexpr double kEps = std::numeric_limits<float>::epsilon();

// Below this, relative to the norm of A, what is left of a new vector is rounding: measured 1e-7.
constexpr double kInvariant = 10 * kEps;

// Mean eigenvalues between these: the squares of all entries stay well inside the range of float.
// Outside, W is scaled by a power of two.
constexpr double kSmallestMean = 1e-12, kLargestMean = 1e12;

constexpr int64_t kSumChunk = 1 << 12;

// What a run on one matrix needs besides the matrix. With more than one thread the run is the only
// one, and its slices and probes are spread over them.
struct Room {
  Workspaces& workspaces;
  Borrowed& set;
  int threads;
};

// y = A x. Each slice is summed on its own and added in order: the same bits on any threads.
void apply(const Product& product, int64_t probes, const float* x, float* y, Room& room) {
  const int64_t size = probes * product.length(), slices = product.slices();
  const auto slice = [&](int64_t index, float* out, Borrowed& set) {
    product.slice(index, probes, x, out, set->scratch.reserve(product.scratch(probes)));
  };
  const auto add = [&](const float* part, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) y[i] += part[i];
  };
  if (room.threads == 1 || slices == 1) {
    slice(0, y, room.set);
    float* part = slices > 1 ? room.set->parts.reserve(size) : nullptr;
    for (int64_t s = 1; s < slices; ++s) {
      slice(s, part, room.set);
      add(part, 0, size);
    }
    return;
  }
  float* parts = room.set->parts.reserve((slices - 1) * size);
  parallel_for(slices, room.threads, [&](int64_t s) {
    Borrowed set(room.workspaces);
    slice(s, s == 0 ? y : parts + (s - 1) * size, set);
  });
  parallel_for((size + kSumChunk - 1) / kSumChunk, room.threads, [&](int64_t chunk) {
    const int64_t begin = chunk * kSumChunk;
    for (int64_t s = 1; s < slices; ++s) {
      add(parts + (s - 1) * size, begin, std::min(size, begin + kSumChunk));
    }
  });
}

// The runs on one matrix: views into a Tridiagonals.
struct Runs {
  int64_t steps, probes;
  bool is_complex;
  double* diagonal;      // (probes, steps)
  double* off_diagonal;  // (probes, steps)
  int32_t* taken;        // (probes,)
};

// Whether the means of the spectrum seen by the first step suit float32.
bool in_range(const Runs& runs, double scale) {
  double largest = 0;
  for (int64_t p = 0; p < runs.probes; ++p) {
    const double mean = runs.diagonal[p * runs.steps];
    if (!std::isfinite(mean)) return false;
    largest = std::max(largest, mean);
  }
  return scale != 1 || (largest > kSmallestMean && largest < kLargestMean);
}

// Random signs, 128 probes for each call of Philox. q: (padded probes, length)
void fill_signs(const Starts& starts, const Matrix& m, int64_t length, float* q) {
  const Stream stream{starts.seed, starts.names[static_cast<size_t>(m.layer)], Purpose::probe,
                      starts.draw};
  const auto first = static_cast<uint64_t>(m.index * m.length());
  for (int64_t p = 0; p < starts.probes; p += 128) {
    const auto block = static_cast<uint32_t>(p / 128);
    const int64_t columns = std::min<int64_t>(128, starts.probes - p);
    for (int64_t i = 0; i < m.length(); ++i) {
      const Philox bits = stream.bits(first + static_cast<uint64_t>(i), block);
      for (int64_t b = 0; b < columns; ++b) {
        const bool minus = (bits.word[b / 32] >> (b % 32)) & 1u;
        q[(p + b) * length + i] = minus ? -1.0f : 1.0f;
      }
    }
  }
}

// The first vectors of the basis, (padded probes, length), normalised; zero where there is none.
void start(const Kernels& k, const Starts& starts, const Matrix& m, int64_t index,
           int64_t padded_probes, int64_t length, float* basis) {
  std::fill(basis, basis + padded_probes * length, 0.0f);
  if (starts.given.empty()) {
    fill_signs(starts, m, length, basis);
  } else {
    const float* from = starts.given[static_cast<size_t>(index)];
    for (int64_t p = 0; p < starts.probes; ++p) {
      std::copy(from + p * m.length(), from + (p + 1) * m.length(), basis + p * length);
    }
  }
  for (int64_t p = 0; p < starts.probes; ++p) {
    float* q = basis + p * length;
    const double norm = std::sqrt(k.inner_product(q, q, length));
    if (norm > 0) k.scaled_copy(q, 1 / norm, q, length);
  }
}

// Multiplies a complex vector by i or by -i.
void turn(float* w, int64_t length, float sign) {
  for (int64_t n = 0; n < length; n += 2) {
    const float re = w[n];
    w[n] = -sign * w[n + 1];
    w[n + 1] = sign * re;
  }
}

// One step of one run: w = A q_j becomes the next vector of the basis. False if the run ends here;
// the next vector is then zero.
//   basis: of this run, vectors `stride` apart     next: null at the last step
//   products: scratch for j + 1 numbers
bool advance(const Kernels& k, int64_t j, const float* basis, int64_t stride, int64_t length,
             float* w, float* next, Runs& runs, int64_t probe, double* products) {
  double* a = runs.diagonal + probe * runs.steps;
  double* b = runs.off_diagonal + probe * runs.steps;
  const float* q = basis + j * stride;
  a[j] = k.inner_product(q, w, length);
  runs.taken[probe] = static_cast<int32_t>(j + 1);
  if (next == nullptr) return false;
  k.subtract_scaled(q, a[j], w, length);
  if (j > 0) k.subtract_scaled(q - stride, b[j - 1], w, length);
  k.project_out(basis, stride, j + 1, w, length, products);
  if (runs.is_complex) {
    // Every eigenvalue has a second eigenvector, i times the first: rounding must not let it in.
    turn(w, length, -1);
    k.project_out(basis, stride, j + 1, w, length, products);
    turn(w, length, 1);
  }
  b[j] = std::sqrt(k.inner_product(w, w, length));
  double norm = 0;
  for (int64_t i = 0; i <= j; ++i) norm = std::max(norm, std::abs(a[i]) + (i > 0 ? b[i - 1] : 0));
  const bool goes_on = b[j] > kInvariant * norm;
  k.scaled_copy(w, goes_on ? 1 / b[j] : 0.0, next, length);
  return goes_on;
}

// All runs on one matrix. False if numbers left the range of float32, or are not numbers.
bool run(const Matrix& m, int64_t index, const Starts& starts, double scale, Runs runs,
         Room& room) {
  const Product product(m, scale);
  const Kernels& k = product.kernels();
  const int64_t length = product.length(), padded = round_up(runs.probes, kProbes);
  // No Krylov space has more dimensions than W has different eigenvalues.
  const int64_t steps = std::min(runs.steps, m.count()), stride = padded * length;
  float* basis = room.set->basis.reserve(steps * stride);
  float* y = room.set->y.reserve(stride);
  double* products = room.set->products.reserve(runs.probes * steps);
  start(k, starts, m, index, padded, length, basis);
  std::fill(runs.taken, runs.taken + runs.probes, 0);
  std::vector<char> ended(static_cast<size_t>(runs.probes), 0);
  std::atomic<int64_t> running{runs.probes};
  for (int64_t j = 0; j < steps && running > 0; ++j) {
    apply(product, padded, basis + j * stride, y, room);
    parallel_for(runs.probes, room.threads, [&](int64_t p) {
      if (ended[static_cast<size_t>(p)] != 0) return;
      float* next = j + 1 < steps ? basis + (j + 1) * stride + p * length : nullptr;
      float* w = y + p * length;
      if (!advance(k, j, basis + p * length, stride, length, w, next, runs, p,
                   products + p * steps)) {
        ended[static_cast<size_t>(p)] = 1;
        --running;
      }
    });
    if (j == 0 && !in_range(runs, scale)) return false;
  }
  const double unscale = 1 / (scale * scale);
  for (int64_t i = 0; i < runs.probes * runs.steps; ++i) {
    runs.diagonal[i] *= unscale;
    runs.off_diagonal[i] *= unscale;
  }
  return true;
}

// Runs on one matrix, in the scale that its numbers need.
void run_scaled(const Matrix& m, int64_t index, const Starts& starts, Runs runs, Room& room) {
  if (run(m, index, starts, 1, runs, room)) return;
  const double top = largest(kernels(), View(m, 1));
  std::fill(runs.taken, runs.taken + runs.probes, 1);
  if (!std::isfinite(top) || top == 0) {
    const double all = top == 0 ? 0 : std::numeric_limits<double>::quiet_NaN();
    for (int64_t p = 0; p < runs.probes; ++p) runs.diagonal[p * runs.steps] = all;
    return;
  }
  int exponent;
  std::frexp(top, &exponent);
  run(m, index, starts, std::ldexp(1.0, -exponent), runs, room);
}

}  // namespace

void gram_apply(const std::vector<Matrix>& matrices, int64_t probes, const float* x, float* y,
                Workspaces& workspaces, int threads) {
  std::vector<int64_t> offset{0};
  for (const Matrix& m : matrices) offset.push_back(offset.back() + probes * m.length());
  for_each_matrix(matrices, threads, [&](int64_t index, int share) {
    const Matrix& m = matrices[static_cast<size_t>(index)];
    const Product product(m, 1);
    const int64_t length = product.length(), size = round_up(probes, kProbes) * length;
    Borrowed set(workspaces);
    Room room{workspaces, set, share};
    float* padded = set->basis.reserve(size);
    float* out = set->y.reserve(size);
    const int64_t begin = offset[static_cast<size_t>(index)];
    std::fill(padded, padded + size, 0.0f);
    for (int64_t p = 0; p < probes; ++p) {
      const float* from = x + begin + p * m.length();
      std::copy(from, from + m.length(), padded + p * length);
    }
    apply(product, round_up(probes, kProbes), padded, out, room);
    for (int64_t p = 0; p < probes; ++p) {
      std::copy(out + p * length, out + p * length + m.length(), y + begin + p * m.length());
    }
  });
}

Tridiagonals lanczos(const std::vector<Matrix>& matrices, const Starts& starts, int64_t steps,
                     Workspaces& workspaces, int threads) {
  Tridiagonals out;
  out.steps = steps;
  out.probes = starts.probes;
  const auto runs = matrices.size() * static_cast<size_t>(starts.probes);
  out.diagonal.resize(runs * static_cast<size_t>(steps));
  out.off_diagonal.resize(runs * static_cast<size_t>(steps));
  out.taken.resize(runs);
  out.first.assign(starts.names.size() + 1, 0);
  for (const Matrix& m : matrices) {
    ++out.first[static_cast<size_t>(m.layer) + 1];
    out.count.push_back(m.count());
    out.eps.push_back(kEps);
  }
  std::partial_sum(out.first.begin(), out.first.end(), out.first.begin());
  for_each_matrix(matrices, threads, [&](int64_t index, int share) {
    const int64_t first = index * starts.probes;
    const Matrix& m = matrices[static_cast<size_t>(index)];
    const Runs mine{steps,
                    starts.probes,
                    is_complex(m.dtype),
                    out.diagonal.data() + first * steps,
                    out.off_diagonal.data() + first * steps,
                    out.taken.data() + first};
    Borrowed set(workspaces);
    Room room{workspaces, set, share};
    run_scaled(m, index, starts, mine, room);
  });
  return out;
}

}  // namespace tb
