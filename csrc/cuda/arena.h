// How a plan divides the one block of device memory that its kernel works in: first the tables that
// the host fills, then the rest. Host only.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace tb::gpu {

class Arena {
 public:
  // Room for `count` numbers; its offset in bytes, a multiple of 256.
  template <typename T>
  int64_t take(int64_t count) {
    const int64_t offset = size_;
    size_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return offset;
  }

  // Room for a table, and the table: it becomes part of the image. Tables must be taken first.
  template <typename T>
  int64_t put(const std::vector<T>& table) {
    const int64_t offset = take<T>(static_cast<int64_t>(table.size()));
    image_.resize(static_cast<size_t>(size_));
    if (!table.empty()) {
      std::memcpy(image_.data() + offset, table.data(), table.size() * sizeof(T));
    }
    return offset;
  }

  int64_t size() const { return size_; }
  const std::vector<unsigned char>& image() const { return image_; }

 private:
  int64_t size_ = 0;
  std::vector<unsigned char> image_;
};

}  // namespace tb::gpu
