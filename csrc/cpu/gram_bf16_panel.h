// What part of W a pass of gram_bf16.h works on, and how it comes into the cache.
//
// The template parameter, see there, makes all of it local to the file that includes it.
#pragma once

#include <cstdint>
#include <cstring>

namespace tb {

template <typename Lanes>
struct Bf16Blocks {
  static constexpr int64_t kBlock = 32;
  static constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
  static constexpr int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

  // Part of one side of W in blocks of 32. The last block is moved back to end where the part ends,
  // for nothing beyond may be read; what it then shares with the block before counts as zero.
  struct Side {
    int64_t first, end;
    int64_t blocks() const { return (end - first + kBlock - 1) / kBlock; }
    int64_t start(int64_t i) const { return most(0, least(first + kBlock * i, end - kBlock)); }
    int64_t begin(int64_t i) const { return first + kBlock * i - start(i); }
    int64_t stop(int64_t i) const { return least(kBlock, end - start(i)); }
  };

  struct Panel {
    const uint16_t* w;
    int64_t ld;
    Side rows, cols;
  };

  // Fetches a panel into the cache, or into a copy, row by row, eight lines of 64 bytes at a time.
  // A step of either product works on 1 KiB of the panel at hand, so two steps for each KiB fetch
  // the next panel evenly.
  class Fetch {
   public:
    // A copy of the panel has rows of `width` numbers; without one `copy` is a null pointer.
    void start(const uint16_t* from, int64_t ld, int64_t rows, int64_t cols, uint16_t* copy,
               int64_t width) {
      row_ = reinterpret_cast<const char*>(from);
      pitch_ = 2 * ld;
      width_ = 2 * cols;
      rows_ = rows;
      copy_ = reinterpret_cast<char*>(copy);
      copy_pitch_ = 2 * width;
      at_ = first();
      if (copy != nullptr) {
        ahead_ = 1 + kAhead / width_;
        for (int64_t r = 0; r < least(ahead_, rows); ++r) {
          for (int64_t c = 0; c < width_; c += 64) Lanes::prefetch(row_ + r * pitch_ + c);
        }
      }
    }
    void some() {
      if (copy_ == nullptr && at_ + 8 * 64 <= width_) {
        for (int64_t i = 0; i < 8; ++i) Lanes::prefetch(row_ + at_ + 64 * i);
        at_ += 8 * 64;
        return;
      }
      for (int i = 0; i < 8 && rows_ > 0; ++i) {
        if (copy_ != nullptr) {
          copy_line();
        } else if (at_ < width_) {
          Lanes::prefetch(row_ + at_);
        }
        at_ += 64;
        if (at_ >= width_ && --rows_ > 0) {
          row_ += pitch_;
          copy_ += copy_pitch_;
          at_ = first();
        }
      }
    }
    void rest() {
      while (rows_ > 0) some();
    }

   private:
    static constexpr int64_t kAhead = 2048;  // bytes: what arrives within the latency of memory

    // Below 0 if a row to prefetch starts within a line.
    int64_t first() const {
      return copy_ ? 0 : -static_cast<int64_t>(reinterpret_cast<uintptr_t>(row_) & 63);
    }
    void copy_line() {
      if (rows_ > ahead_) Lanes::prefetch(row_ + ahead_ * pitch_ + at_);
      if (at_ + 64 <= width_) {
        Lanes::store(copy_ + at_, Lanes::load(row_ + at_));
      } else {
        std::memcpy(copy_ + at_, row_ + at_, static_cast<size_t>(width_ - at_));
      }
    }

    const char* row_ = nullptr;
    char* copy_ = nullptr;
    int64_t pitch_ = 0, copy_pitch_ = 0, width_ = 0, rows_ = 0, ahead_ = 0, at_ = 0;
  };
};

}  // namespace tb
