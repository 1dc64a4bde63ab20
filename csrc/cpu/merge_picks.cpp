#include "cpu/merge_picks.h"

#include <algorithm>
#include <cstring>

#include "philox.h"

namespace tb {
namespace {

constexpr int64_t kPerCall = 16;  // bytes of a Philox call
constexpr int64_t kWords = 4;     // words of one

int64_t calls_for(int64_t n, int64_t per_call) { return (n + per_call - 1) / per_call; }

}  // namespace

Ranks::Ranks(const MergeKernels& kernels, const std::vector<uint64_t>& bounds)
    : kernels_(&kernels), bytes_(kBlock + 2 * kPerCall), rank_(kBlock) {
  for (const uint64_t bound : bounds) {
    if (bound >> 32 != 0) continue;  // above all numbers
    bounds_.push_back(bound);
    const uint64_t byte = bound >> 24, rest = bound & 0xffffff;
    if (rest != 0) close_.push_back(static_cast<uint8_t>(byte));
    if (byte + (rest != 0) < 256) least_.push_back(static_cast<uint8_t>(byte + (rest != 0)));
  }
}

void Ranks::draw(const DrawKey& key, uint64_t first, int64_t n) {
  if (bounds_.empty()) {
    std::fill_n(rank_.begin(), n, uint8_t{0});
    return;
  }
  const int64_t skip = static_cast<int64_t>(first % kPerCall);
  kernels_->draw_bytes(key, first / kPerCall, calls_for(skip + n, kPerCall), bytes_.data());
  const uint8_t* bytes = bytes_.data() + skip;
  kernels_->rank_bytes(bytes, n, least_.data(), static_cast<int64_t>(least_.size()), rank_.data());
  for (const uint8_t close : close_) {
    const uint8_t* at = bytes;
    const uint8_t* end = bytes + n;
    while ((at = static_cast<const uint8_t*>(
                std::memchr(at, close, static_cast<size_t>(end - at)))) != nullptr) {
      const int64_t j = at++ - bytes;
      const uint64_t element = first + static_cast<uint64_t>(j);
      const Philox rest =
          philox(static_cast<uint32_t>(element), static_cast<uint32_t>(element >> 32), key.word[2],
                 key.word[3] | 1u, key.word[0], key.word[1]);
      const uint64_t number = uint64_t{close} << 24 | rest.word[0] >> 8;
      rank_[static_cast<size_t>(j)] = static_cast<uint8_t>(
          std::upper_bound(bounds_.begin(), bounds_.end(), number) - bounds_.begin());
    }
  }
}

Picks::Picks(const Merge& what, const MergeKernels& kernels)
    : what_(&what),
      kernels_(&kernels),
      first_(kernels, what.bounds),
      again_(kernels, what.bounds),
      words_(what.redraw_changed && what.models.size() > 2 ? kBlock + 2 * kWords : 0) {}

void Picks::draw(const uint32_t* changed, uint64_t place, int64_t n) {
  first_.draw(what_->select, place, n);
  if (changed == nullptr || what_->models.size() == 1) return;
  if (!what_->redraw_changed) {
    for (const DrawKey& key : what_->reselect) {
      again_.draw(key, place, n);
      uint8_t* pick = first_.rank();
      for (int64_t j = 0; j < n; ++j) {
        pick[j] = (changed[j] >> pick[j] & 1) != 0 ? pick[j] : again_.rank()[j];
      }
    }
  } else if (what_->models.size() == 2) {
    kernels_->swap_unchanged(changed, n, first_.rank());
  } else {
    redraw(changed, place, n);
  }
}

// P(i) = w_i / (sum of the weights of the models that changed): a picked one stays, and a second
// draw among them stands for one that has not changed.
void Picks::redraw(const uint32_t* changed, uint64_t place, int64_t n) {
  const int64_t skip = static_cast<int64_t>(place % kWords);
  kernels_->draw_bytes(what_->reselect[0], place / kWords, calls_for(skip + n, kWords),
                       reinterpret_cast<uint8_t*>(words_.data()));
  uint8_t* pick = first_.rank();
  for (int64_t j = 0; j < n; ++j) {
    const uint32_t among = changed[j];
    if (among == 0 || (among >> pick[j] & 1) != 0) continue;
    uint64_t total = 0;
    for (size_t i = 0; i < what_->bounds.size(); ++i) total += share(i, among);
    if (total == 0) continue;  // models without weight are never taken
    uint64_t left = uint64_t{words_[static_cast<size_t>(skip + j)]} * total >> 32;
    size_t i = 0;
    while (left >= share(i, among)) left -= share(i++, among);
    pick[j] = static_cast<uint8_t>(i);
  }
}

uint64_t Picks::share(size_t model, uint32_t among) const {
  if ((among >> model & 1) == 0) return 0;
  return what_->bounds[model] - (model == 0 ? 0 : what_->bounds[model - 1]);
}

}  // namespace tb
