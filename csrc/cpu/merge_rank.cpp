// TIES' threshold: an order statistic of differences that are read, not kept.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <type_traits>

#include "cpu/merge_whole.h"
#include "cpu/parallel.h"

namespace tb {
namespace {

constexpr int64_t kSamples = 256;              // blocks of a sample, at the most
constexpr int64_t kSample = 256;               // elements of each
constexpr double kMargin = 0.02;               // of the sample, either side of the rank sought
constexpr size_t kMostKept = size_t{1} << 22;  // magnitudes of a model that are kept
constexpr int kDigit = 11;                     // bits that are counted at a time

// The element that `rank` others (of any order among equals) are larger than, or as large: found by
// counting the highest digits in which the values differ, then those of the values that share them.
template <typename T>
T largest(const std::vector<T>& values, int64_t rank) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;  // ordered as the values are
  std::vector<Bits> left(values.size());
  std::memcpy(left.data(), values.data(), values.size() * sizeof(T));
  for (;;) {
    const auto [least, most] = std::minmax_element(left.begin(), left.end());
    const Bits from = *least, range = *most - from;
    if (range == 0) {
      T found;
      std::memcpy(&found, &from, sizeof(T));
      return found;
    }
    int shift = 0;
    while (range >> shift >> kDigit != 0) ++shift;
    std::array<int64_t, 1 << kDigit> count{};
    for (const Bits bits : left) ++count[(bits - from) >> shift];
    size_t digit = count.size() - 1;
    while (rank >= count[digit]) rank -= count[digit--];
    const auto other = [=](Bits bits) { return (bits - from) >> shift != digit; };
    left.erase(std::remove_if(left.begin(), left.end(), other), left.end());
  }
}

// What a pass sees of one model in a chunk.
template <typename T>
struct Tally {
  std::array<int64_t, 4> counts{};  // as MergeArithmetic counts
  std::vector<T> kept = std::vector<T>(kChunk);

  void add(const MergeArithmetic<T>& does, const T* x, int64_t n, T low, T high) {
    int64_t more[4];
    does.tally(x, n, low, high, more, kept.data() + counts[3]);
    for (size_t i = 0; i < counts.size(); ++i) counts[i] += more[i];
  }
};

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

  void add(const Tally<T>& seen) {
    above += seen.counts[0];
    at_high += seen.counts[1];
    at_low += low < high ? seen.counts[2] : 0;
    between += seen.counts[3];
    const auto room = static_cast<int64_t>(kMostKept - std::min(kMostKept, kept.size()));
    kept.insert(kept.end(), seen.kept.begin(), seen.kept.begin() + std::min(room, seen.counts[3]));
  }

  // Bounds around the share of those kept that is larger than what is sought.
  void narrow(double share) {
    const auto size = static_cast<double>(kept.size());
    const auto before = static_cast<int64_t>(std::floor((share - kMargin) * size));
    const auto after = static_cast<int64_t>(std::ceil((share + kMargin) * size));
    const int64_t last = static_cast<int64_t>(kept.size()) - 1;
    high = before >= 0 && last >= 0 ? largest(kept, std::min(before, last)) : most;
    low = after <= last ? largest(kept, after) : least;
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
      if (between == static_cast<int64_t>(kept.size())) return finish(largest(kept, left - 1));
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
      std::vector<T> base(kBlock), x(kBlock);
      thread_local std::vector<Tally<T>> seen;
      seen.resize(std::max(seen.size(), models.size()));
      for (Tally<T>& tally : seen) tally.counts = {};
      for (int64_t at = 0; at < taken; at += kBlock) {
        const int64_t n = std::min(kBlock, taken - at);
        numbers.decode(models.size(), at, n, base.data());
        for (size_t i = 0; i < models.size(); ++i) {
          if (models[i].done) continue;
          numbers.delta(i, base.data(), at, n, 0, 1, x.data());
          seen[i].add(arithmetic<T>(isa), x.data(), n, models[i].low, models[i].high);
        }
      }
      const std::lock_guard<std::mutex> guard(lock);
      for (size_t i = 0; i < models.size(); ++i) models[i].add(seen[i]);
    });
  };
  const auto of_each = [&](const auto& task) {
    parallel_for(static_cast<int64_t>(models.size()), threads,
                 [&](int64_t i) { task(models[static_cast<size_t>(i)]); });
  };
  const int64_t apart = what.elements / kSamples;
  if (apart > 4 * kSample) {
    pass(apart, kSample);
    const double share = static_cast<double>(rank) / static_cast<double>(what.elements);
    of_each([=](Search<T>& model) {
      const auto seen = static_cast<double>(model.between + model.at_low);
      if (model.between > 0) model.narrow(share * seen / static_cast<double>(model.between));
    });
  }
  const auto is_done = [](const Search<T>& model) { return model.done; };
  while (!std::all_of(models.begin(), models.end(), is_done)) {
    pass(kChunk, kChunk);
    of_each([=](Search<T>& model) {
      if (!model.done) model.conclude(rank);
    });
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
