// What fine-tuning has changed, counted chunk by chunk and added in the order of the chunks.
#include <algorithm>

#include "cpu/isa.h"
#include "cpu/merge_block.h"
#include "cpu/parallel.h"
#include "merge.h"

namespace tb {
namespace {

void add(const Difference& next, Difference* sum) {
  for (size_t i = 0; i < next.changed.size(); ++i) {
    sum->changed[i] += next.changed[i];
    sum->bad[i] += next.bad[i];
  }
  for (size_t i = 0; i < next.products.size(); ++i) sum->products[i] += next.products[i];
  sum->unchanged += next.unchanged;
}

int64_t count_bad(const Kernels& isa, const char* from, Number type, int64_t width, int64_t n) {
  if (isa.merge.all_finite(from, type, n)) return 0;
  int64_t count = 0;
  for (int64_t j = 0; j < n; ++j) count += isa.merge.all_finite(from + j * width, type, 1) ? 0 : 1;
  return count;
}

template <typename T>
class Counting {
 public:
  Counting(const Merge& what, const Kernels& isa, const ChunkInputs& inputs)
      : what_(what),
        isa_(isa),
        inputs_(inputs),
        numbers_(what, isa, inputs),
        models_(what.models.size()),
        any_(kBlock),
        one_(kBlock),
        base_(kBlock),
        x_(models_, std::vector<T>(kBlock)) {}

  void block(int64_t at, int64_t n, Difference* found) {
    std::fill_n(any_.begin(), n, 0u);
    const char* old = inputs_.input(models_) + at * what_.width;
    for (size_t i = 0; i < models_; ++i) {
      const char* from = inputs_.input(i) + at * what_.width;
      std::fill_n(one_.begin(), n, 0u);
      isa_.merge.mark_changed(from, old, n, what_.width, 1, one_.data());
      isa_.merge.mark_changed(from, old, n, what_.width, 1, any_.data());
      found->changed[i] += n - isa_.merge.count_unchanged(one_.data(), n);
      found->bad[i] += count_bad(isa_, from, what_.type, what_.width, n);
    }
    found->unchanged += isa_.merge.count_unchanged(any_.data(), n);
    if (what_.type == Number::bits) return;
    numbers_.decode(models_, at, n, base_.data());
    for (size_t i = 0; i < models_; ++i) {
      numbers_.delta(i, base_.data(), at, n, 0, 1, x_[i].data());
      for (size_t j = 0; j <= i; ++j) {
        found->products[i * models_ + j] +=
            arithmetic<T>(isa_).inner(x_[i].data(), x_[j].data(), n);
      }
    }
  }

 private:
  const Merge& what_;
  const Kernels& isa_;
  const ChunkInputs& inputs_;
  Deltas<T> numbers_;
  size_t models_;
  std::vector<uint32_t> any_, one_;
  std::vector<T> base_;
  std::vector<std::vector<T>> x_;
};

template <typename T>
void count(const Merge& what, const Kernels& isa, const ChunkInputs& inputs, int64_t elements,
           Difference* found) {
  Counting<T> counting(what, isa, inputs);
  for (int64_t at = 0; at < elements; at += kBlock) {
    counting.block(at, std::min(kBlock, elements - at), found);
  }
}

Difference empty(size_t models) {
  Difference made;
  made.changed.assign(models, 0);
  made.bad.assign(models, 0);
  made.products.assign(models * models, 0.0);
  return made;
}

}  // namespace

std::vector<Difference> differences(const std::vector<Merge>& tensors, int threads) {
  const Kernels& isa = kernels();
  std::vector<Difference> found;
  for (size_t tensor = 0; tensor < tensors.size(); ++tensor) {
    const Merge& what = tensors[tensor];
    const size_t models = what.models.size();
    const int64_t chunks = (what.elements + kChunk - 1) / kChunk;
    std::vector<Difference> parts(static_cast<size_t>(chunks), empty(models));
    parallel_for(chunks, threads, [&](int64_t c) {
      thread_local ChunkInputs inputs;
      const int64_t first = c * kChunk, elements = std::min(kChunk, what.elements - first);
      inputs.load(what, static_cast<int64_t>(tensor), first, elements);
      (needs_double(what) ? count<double> : count<float>)(what, isa, inputs, elements,
                                                          &parts[static_cast<size_t>(c)]);
    });
    found.push_back(empty(models));
    for (const Difference& part : parts) add(part, &found.back());
  }
  return found;
}

}  // namespace tb
