// TIES' threshold: an order statistic of differences that are read, not kept.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <mutex>

#include "cpu/merge_whole.h"
#include "cpu/parallel.h"

namespace tb {
namespace {

constexpr int64_t kSampled = 256;  // blocks of a sample, at the most
constexpr double kMargin = 0.015;  // of the sample, either side of the rank that is sought
constexpr size_t kMostKept = size_t{1} << 22;  // magnitudes of a model that are kept

// What is known of one model: the magnitude sought lies in [low, high].
template <typename T>
struct Search {
  T low = 0, high = std::numeric_limits<T>::infinity();    // of the pass to come
  T least = 0, most = std::numeric_limits<T>::infinity();  // certain
  bool done = false;
  double found = 0;
  int64_t above = 0, at_high = 0, at_low = 0, between = 0;
  std::vector<T> kept;  // of those between

  void begin_pass() {
    above = at_high = at_low = between = 0;
    kept.clear();
  }

  void add(const int64_t* counts, const T* values) {
    above += counts[0];
    at_high += counts[1];
    at_low += low < high ? counts[2] : 0;
    between += counts[3];
    const size_t room = kMostKept - std::min(kMostKept, kept.size());
    kept.insert(kept.end(), values, values + std::min(room, static_cast<size_t>(counts[3])));
  }

  T largest(int64_t rank) {  // of those kept, counted from 0
    const auto at = kept.begin() + rank;
    std::nth_element(kept.begin(), at, kept.end(), std::greater<T>());
    return *at;
  }

  // Bounds around the share of those kept that is larger than what is sought.
  void narrow(double share) {
    const auto size = static_cast<double>(kept.size());
    const auto before = static_cast<int64_t>(std::floor((share - kMargin) * size));
    const auto after = static_cast<int64_t>(std::ceil((share + kMargin) * size));
    const int64_t last = static_cast<int64_t>(kept.size()) - 1;
    high = before >= 0 && last >= 0 ? largest(std::min(before, last)) : most;
    low = after <= last ? largest(after) : least;
  }

  // After a pass over all elements.
  void conclude(int64_t rank) {
    if (rank <= above) {
      least = low = high;
      high = most;
    } else if (rank <= above + at_high) {
      finish(high);
    } else if (rank <= above + at_high + between) {
      const int64_t left = rank - above - at_high;
      if (between == static_cast<int64_t>(kept.size())) return finish(largest(left - 1));
      least = low;
      most = high;
      narrow(static_cast<double>(left) / static_cast<double>(between));
    } else if (rank <= above + at_high + between + at_low || low == 0) {
      finish(low);
    } else {
      most = high = low;
      low = least;
    }
  }

  void finish(T value) {
    done = true;
    found = static_cast<double>(value);
    kept = {};
  }
};

template <typename T>
std::vector<double> search(const Merge& what, int64_t tensor, int64_t rank, const Kernels& isa,
                           int threads) {
  std::vector<Search<T>> models(what.models.size());
  std::mutex lock;
  // Goes over `count` elements from each `step` on.
  const auto pass = [&](int64_t step, int64_t count) {
    for (Search<T>& model : models) model.begin_pass();
    parallel_for((what.elements + step - 1) / step, threads, [&](int64_t part) {
      thread_local ChunkInputs inputs;
      const int64_t first = part * step, taken = std::min(count, what.elements - first);
      inputs.load(what, tensor, first, taken);
      Deltas<T> numbers(what, isa, inputs);
      std::vector<T> base(kBlock), x(kBlock), kept(kBlock);
      for (int64_t at = 0; at < taken; at += kBlock) {
        const int64_t n = std::min(kBlock, taken - at);
        numbers.decode(models.size(), at, n, base.data());
        for (size_t i = 0; i < models.size(); ++i) {
          if (models[i].done) continue;
          numbers.delta(i, base.data(), at, n, 0, 1, x.data());
          int64_t counts[4];
          arithmetic<T>(isa).tally(x.data(), n, models[i].low, models[i].high, counts, kept.data());
          const std::lock_guard<std::mutex> guard(lock);
          models[i].add(counts, kept.data());
        }
      }
    });
  };
  const int64_t apart = what.elements / kSampled;
  if (apart > 4 * kBlock) {
    pass(apart, kBlock);
    const double share = static_cast<double>(rank) / static_cast<double>(what.elements);
    for (Search<T>& model : models) {
      const auto seen = static_cast<double>(model.between + model.at_low);
      if (model.between > 0) model.narrow(share * seen / static_cast<double>(model.between));
    }
  }
  const auto is_done = [](const Search<T>& model) { return model.done; };
  while (!std::all_of(models.begin(), models.end(), is_done)) {
    pass(kChunk, kChunk);
    for (Search<T>& model : models) {
      if (!model.done) model.conclude(rank);
    }
  }
  std::vector<double> found;
  for (const Search<T>& model : models) found.push_back(model.found);
  return found;
}

}  // namespace

std::vector<double> magnitudes_of_rank(const Merge& what, int64_t tensor, int64_t rank,
                                       const Kernels& isa, int threads) {
  return needs_double(what) ? search<double>(what, tensor, rank, isa, threads)
                            : search<float>(what, tensor, rank, isa, threads);
}

}  // namespace tb
