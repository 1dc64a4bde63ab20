#include "cpu/merge_block.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/merge_io.h"

namespace tb {
namespace {

bool is_dare(const Merge& what) {
  return what.method == Method::dare_linear || what.method == Method::dare_ties;
}

bool elects(const Merge& what) {
  return what.method == Method::ties || what.method == Method::dare_ties;
}

// Notes the first element of a block that is NaN or infinite.
void look(const Kernels& isa, const char* from, Number type, int64_t width, int64_t n,
          int64_t input, uint64_t place, Merged* found) {
  if (found->bad_element >= 0 || isa.merge.all_finite(from, type, n)) return;
  int64_t j = 0;
  while (isa.merge.all_finite(from + j * width, type, 1)) ++j;
  found->bad_element = static_cast<int64_t>(place) + j;
  found->bad_input = input;
}

// Selection, and anything else that copies bits.
class Selecting {
 public:
  Selecting(const Merge& what, const Kernels& isa, const ChunkInputs& inputs)
      : what_(what),
        isa_(isa),
        inputs_(inputs),
        picks_(what, isa.merge),
        changed_(what.base.empty() ? 0 : kBlock),
        converted_(what.input_count()) {}

  void block(int64_t at, int64_t n, uint64_t place, char* out, Merged* found) {
    const size_t models = what_.models.size();
    const MergeKernels& does = isa_.merge;
    if (!changed_.empty()) {
      std::fill_n(changed_.begin(), n, 0u);
      const char* base = values(models, at, n);
      for (size_t i = 0; i < models; ++i) {
        does.mark_changed(values(i, at, n), base, n, what_.width, 1u << i, changed_.data());
      }
      found->unchanged += does.count_unchanged(changed_.data(), n);
    }
    picks_.draw(changed_.empty() ? nullptr : changed_.data(), place, n);
    std::memcpy(out, values(0, at, n), static_cast<size_t>(n * what_.width));
    int64_t others = 0;
    for (size_t i = 1; i < models; ++i) {
      const auto which = static_cast<uint8_t>(i);
      does.take(values(i, at, n), picks_.pick(), which, n, what_.width, out);
      const int64_t count = does.count_picked(picks_.pick(), which, n);
      found->picked[i] += count;
      others += count;
    }
    found->picked[0] += n - others;
  }

 private:
  // A block of an input in the type of the output.
  const char* values(size_t i, int64_t at, int64_t n) {
    const Input& input = what_.input(i);
    const char* from = inputs_.input(i) + at * bytes_of(input.type, what_.width);
    if (input.type == what_.type) return from;
    std::vector<char>& to = converted_[i];
    to.resize(static_cast<size_t>(kBlock * what_.width));
    numbers_.resize(kBlock);
    isa_.merge.decode_f64(from, input.type, n, numbers_.data());
    isa_.merge.encode_f64(numbers_.data(), what_.type, n, to.data());
    return to.data();
  }

  const Merge& what_;
  const Kernels& isa_;
  const ChunkInputs& inputs_;
  Picks picks_;
  std::vector<uint32_t> changed_;
  std::vector<std::vector<char>> converted_;
  std::vector<double> numbers_;
};

// The methods that compute, in T.
template <typename T>
class Computing {
 public:
  Computing(const Merge& what, const Whole& whole, const Kernels& isa, const ChunkInputs& inputs)
      : what_(what),
        whole_(whole),
        isa_(isa),
        does_(arithmetic<T>(isa)),
        deltas_(what, isa, inputs),
        sum_(kBlock),
        total_(kBlock),
        base_(kBlock),
        x_(elects(what) ? what.models.size() : 1, std::vector<T>(kBlock)) {}

  void block(int64_t at, int64_t n, uint64_t place, char* out, Merged* found) {
    const std::vector<T>& result = what_.base.empty() ? averaged(at, n) : moved(at, n, place);
    if constexpr (sizeof(T) == 4) {
      isa_.merge.encode_f32(result.data(), what_.type, n, out);
    } else {
      isa_.merge.encode_f64(result.data(), what_.type, n, out);
    }
    look(isa_, out, what_.type, what_.width, n, -1, place, found);
  }

 private:
  // Sum of the models by weight.
  const std::vector<T>& averaged(int64_t at, int64_t n) {
    std::fill_n(sum_.begin(), n, T(-0.0));  // to which adding -0 is no change
    for (size_t i = 0; i < what_.models.size(); ++i) {
      if (whole_.weight[i] == 0) continue;
      deltas_.decode(i, at, n, x_[0].data());
      does_.add_scaled(x_[0].data(), static_cast<T>(whole_.weight[i]), n, sum_.data());
    }
    return sum_;
  }

  // The base and a sum, or what the majority wants, of the differences to it.
  const std::vector<T>& moved(int64_t at, int64_t n, uint64_t place) {
    deltas_.decode(what_.models.size(), at, n, base_.data());
    std::fill_n(sum_.begin(), n, T(0));
    for (size_t i = 0; i < what_.models.size(); ++i) {
      T* x = x_[elects(what_) ? i : 0].data();
      const double factor = whole_.factor.empty() ? 1 : whole_.factor[i];
      deltas_.delta(i, base_.data(), at, n, place, factor, x);
      if (!whole_.threshold.empty()) does_.trim(static_cast<T>(whole_.threshold[i]), n, x);
      does_.add_scaled(x, static_cast<T>(what_.weights[i]), n, sum_.data());
    }
    if (elects(what_)) elect(n);
    does_.add_scaled(sum_.data(), static_cast<T>(what_.scale), n, base_.data());
    return base_;
  }

  void elect(int64_t n) {
    direction_ = sum_;
    std::fill_n(sum_.begin(), n, T(0));
    std::fill_n(total_.begin(), n, T(0));
    for (size_t i = 0; i < what_.models.size(); ++i) {
      does_.elect(x_[i].data(), static_cast<T>(what_.weights[i]), direction_.data(), n, sum_.data(),
                  total_.data());
    }
    does_.divide(total_.data(), n, sum_.data());
  }

  const Merge& what_;
  const Whole& whole_;
  const Kernels& isa_;
  const MergeArithmetic<T>& does_;
  Deltas<T> deltas_;
  std::vector<T> sum_, total_, base_, direction_;
  std::vector<std::vector<T>> x_;
};

template <typename Blocks>
void run(Blocks blocks, const Merge& what, int64_t first, int64_t count, char* out, Merged* found) {
  for (int64_t at = 0; at < count; at += kBlock) {
    const auto place = static_cast<uint64_t>(what.start + first + at);
    blocks.block(at, std::min(kBlock, count - at), place, out + at * what.width, found);
  }
}

}  // namespace

int64_t bytes_of(Number type, int64_t width) {
  constexpr int64_t kBytes[] = {0, 1, 1, 2, 2, 4, 8};
  return type == Number::bits ? width : kBytes[static_cast<int64_t>(type)];
}

bool needs_double(const Merge& what) {
  bool found = what.type == Number::f64;
  for (size_t i = 0; i < what.input_count(); ++i) found |= what.input(i).type == Number::f64;
  return found;
}

template <>
const MergeArithmetic<float>& arithmetic(const Kernels& isa) {
  return isa.merge_f32;
}
template <>
const MergeArithmetic<double>& arithmetic(const Kernels& isa) {
  return isa.merge_f64;
}

void ChunkInputs::load(const Merge& what, int64_t tensor, int64_t first, int64_t count) {
  begins_.resize(what.input_count());
  bytes_.resize(std::max(bytes_.size(), begins_.size()));
  for (size_t i = 0; i < begins_.size(); ++i) {
    const Input& from = what.input(i);
    const int64_t size = bytes_of(from.type, what.width);
    begins_[i] = from.place.memory + first * size;
    const bool is_aligned =
        reinterpret_cast<uintptr_t>(begins_[i]) % static_cast<uintptr_t>(size) == 0;
    if (from.place.memory != nullptr && is_aligned) continue;
    if (bytes_[i].empty()) bytes_[i].resize(static_cast<size_t>(kChunk * 8));
    read_input(what, tensor, i, first * size, count * size, bytes_[i].data());
    begins_[i] = bytes_[i].data();
  }
}

template <typename T>
uint64_t Deltas<T>::keep_bound(const Merge& what) {
  return is_dare(what) ? static_cast<uint64_t>(std::llround(std::ldexp(what.density, 32)))
                       : uint64_t{1} << 32;
}

template <typename T>
void Deltas<T>::decode(size_t i, int64_t at, int64_t n, T* to) const {
  const Number type = what_.input(i).type;
  const char* from = inputs_.input(i) + at * bytes_of(type, what_.width);
  if constexpr (sizeof(T) == 4) {
    isa_.merge.decode_f32(from, type, n, to);
  } else {
    isa_.merge.decode_f64(from, type, n, to);
  }
}

template <typename T>
void Deltas<T>::delta(size_t i, const T* base, int64_t at, int64_t n, uint64_t place, double factor,
                      T* x) {
  decode(i, at, n, x);
  arithmetic<T>(isa_).subtract(base, n, x);
  if (!is_dare(what_)) return;
  drops_.draw(what_.drop[i], place, n);
  arithmetic<T>(isa_).drop(drops_.rank(), static_cast<T>(factor), n, x);
}

template class Deltas<float>;
template class Deltas<double>;

Merged merge_chunk(const Merge& what, const Whole& whole, const Kernels& isa,
                   const ChunkInputs& inputs, int64_t first, int64_t count, char* out) {
  Merged found;
  found.picked.assign(what.models.size(), 0);
  const auto place = static_cast<uint64_t>(what.start + first);
  for (size_t i = 0; i < what.input_count(); ++i) {
    const Input& from = what.input(i);
    look(isa, inputs.input(i), from.type, bytes_of(from.type, what.width), count,
         static_cast<int64_t>(i), place, &found);
  }
  if (what.method == Method::select) {
    run(Selecting(what, isa, inputs), what, first, count, out, &found);
  } else if (needs_double(what)) {
    run(Computing<double>(what, whole, isa, inputs), what, first, count, out, &found);
  } else {
    run(Computing<float>(what, whole, isa, inputs), what, first, count, out, &found);
  }
  return found;
}

}  // namespace tb
