#include "cpu/merge_whole.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>

#include "cpu/parallel.h"

namespace tb {
namespace {

constexpr double kParallel = 0.9995;  // cosine from which on SLERP is a straight line

// Sums of numbers of each chunk, added in the order of the chunks.
//   add(inputs, first, count, sums): those of a chunk
using Adding = std::function<void(const ChunkInputs&, int64_t, int64_t, double*)>;

std::vector<double> sums_over(const Merge& what, int64_t tensor, size_t sums, int threads,
                              const Adding& add) {
  const int64_t chunks = (what.elements + kChunk - 1) / kChunk;
  std::vector<double> parts(static_cast<size_t>(chunks) * sums, 0.0), total(sums, 0.0);
  parallel_for(chunks, threads, [&](int64_t c) {
    thread_local ChunkInputs inputs;
    const int64_t first = c * kChunk, count = std::min(kChunk, what.elements - first);
    inputs.load(what, tensor, first, count);
    add(inputs, first, count, parts.data() + static_cast<size_t>(c) * sums);
  });
  for (size_t i = 0; i < parts.size(); ++i) total[i % sums] += parts[i];
  return total;
}

template <typename T>
Adding inner_products(const Merge& what, const Kernels& isa) {
  return [&](const ChunkInputs& inputs, int64_t, int64_t count, double* sums) {
    const Deltas<T> numbers(what, isa, inputs);
    std::vector<T> a(kBlock), b(kBlock);
    for (int64_t at = 0; at < count; at += kBlock) {
      const int64_t n = std::min(kBlock, count - at);
      numbers.decode(0, at, n, a.data());
      numbers.decode(1, at, n, b.data());
      sums[0] += arithmetic<T>(isa).inner(a.data(), a.data(), n);
      sums[1] += arithmetic<T>(isa).inner(a.data(), b.data(), n);
      sums[2] += arithmetic<T>(isa).inner(b.data(), b.data(), n);
    }
  };
}

// L1 norm of the differences of each model, whole and after dropping.
template <typename T>
Adding norms(const Merge& what, const Kernels& isa) {
  return [&](const ChunkInputs& inputs, int64_t first, int64_t count, double* sums) {
    Deltas<T> numbers(what, isa, inputs);
    const size_t models = what.models.size();
    std::vector<T> base(kBlock), x(kBlock);
    for (int64_t at = 0; at < count; at += kBlock) {
      const int64_t n = std::min(kBlock, count - at);
      const auto place = static_cast<uint64_t>(what.start + first + at);
      numbers.decode(models, at, n, base.data());
      for (size_t i = 0; i < models; ++i) {
        numbers.decode(i, at, n, x.data());
        arithmetic<T>(isa).subtract(base.data(), n, x.data());
        sums[2 * i] += arithmetic<T>(isa).magnitudes(x.data(), n);
        numbers.delta(i, base.data(), at, n, place, 1, x.data());
        sums[2 * i + 1] += arithmetic<T>(isa).magnitudes(x.data(), n);
      }
    }
  };
}

// [sin((1 - t) angle) a + sin(t angle) b] / sin(angle)
std::vector<double> slerp_weights(double t, const std::vector<double>& sums) {
  const std::vector<double> straight{1 - t, t};
  const double size = std::sqrt(sums[0]) * std::sqrt(sums[2]);
  if (!(size > 0) || t == 0 || t == 1) return straight;
  const double cosine = sums[1] / size;
  if (!(std::abs(cosine) <= kParallel)) return straight;
  const double angle = std::acos(cosine), sine = std::sin(angle);
  return {std::sin((1 - t) * angle) / sine, std::sin(t * angle) / sine};
}

}  // namespace

bool looks_at_all(const Merge& what) {
  const bool is_dare = what.method == Method::dare_linear || what.method == Method::dare_ties;
  return what.method == Method::slerp || what.method == Method::ties ||
         (is_dare && what.rescale == Rescale::l1);
}

Whole examine(const Merge& what, int64_t tensor, const Kernels& isa, int threads) {
  Whole whole;
  const bool wide = needs_double(what);
  if (what.method == Method::linear) {
    whole.weight = what.weights;
  } else if (what.method == Method::slerp) {
    const auto adding = wide ? inner_products<double>(what, isa) : inner_products<float>(what, isa);
    whole.weight = slerp_weights(what.t, sums_over(what, tensor, 3, threads, adding));
  } else if (what.method == Method::ties) {
    const double kept = std::nearbyint(what.density * static_cast<double>(what.elements));
    const int64_t rank = std::max<int64_t>(1, static_cast<int64_t>(kept));
    if (what.elements > 0) whole.threshold = magnitudes_of_rank(what, tensor, rank, isa, threads);
  } else if (what.method == Method::dare_linear || what.method == Method::dare_ties) {
    const size_t models = what.models.size();
    whole.factor.assign(models, what.rescale == Rescale::paper ? 1 / what.density : 1.0);
    if (what.rescale == Rescale::l1) {
      const auto adding = wide ? norms<double>(what, isa) : norms<float>(what, isa);
      const std::vector<double> sums = sums_over(what, tensor, 2 * models, threads, adding);
      for (size_t i = 0; i < models; ++i) {
        whole.factor[i] = sums[2 * i + 1] > 0 ? sums[2 * i] / sums[2 * i + 1] : 1.0;
      }
    }
  }
  return whole;
}

}  // namespace tb
