// Memory that verbs use again and again.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace tb {

// Memory that starts at a cache line and is not initialised.
template <typename T>
class Buffer {
 public:
  // Room for `size` elements, of undefined value unless that much was there before.
  T* reserve(int64_t size) {
    if (size > size_) {
      memory_.reset();  // never hold the old and the new one
      size_ = 0;
      const auto bytes = static_cast<size_t>(size) * sizeof(T);
      memory_.reset(static_cast<T*>(::operator new(bytes, std::align_val_t(64))));
      size_ = size;
    }
    return memory_.get();
  }
  int64_t bytes() const { return size_ * static_cast<int64_t>(sizeof(T)); }

 private:
  struct Free {
    void operator()(T* memory) const { ::operator delete(memory, std::align_val_t(64)); }
  };
  std::unique_ptr<T[], Free> memory_;
  int64_t size_ = 0;
};

// As many sets as were in use at once, each as large as its largest user wanted.
class Workspaces {
 public:
  struct Set {
    Buffer<float> basis, y, parts, scratch;
    Buffer<double> products;
  };

  // A set that nobody else has, until the caller gives it back.
  std::unique_ptr<Set> take() {
    const std::lock_guard<std::mutex> guard(lock_);
    if (free_.empty()) return std::make_unique<Set>();
    std::unique_ptr<Set> set = std::move(free_.back());
    free_.pop_back();
    return set;
  }
  void give(std::unique_ptr<Set> set) {
    const std::lock_guard<std::mutex> guard(lock_);
    free_.push_back(std::move(set));
  }
  int64_t bytes() const {
    const std::lock_guard<std::mutex> guard(lock_);
    int64_t total = 0;
    for (const auto& set : free_) {
      total += set->basis.bytes() + set->y.bytes() + set->parts.bytes() + set->scratch.bytes() +
               set->products.bytes();
    }
    return total;
  }

 private:
  mutable std::mutex lock_;
  std::vector<std::unique_ptr<Set>> free_;
};

// Borrows a set for as long as it lives.
class Borrowed {
 public:
  explicit Borrowed(Workspaces& from) : from_(from), set_(from.take()) {}
  ~Borrowed() { from_.give(std::move(set_)); }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  Workspaces::Set* operator->() { return set_.get(); }

 private:
  Workspaces& from_;
  std::unique_ptr<Workspaces::Set> set_;
};

}  // namespace tb
