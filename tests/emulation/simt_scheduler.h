// The threads of a launch and the order in which they take turns.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "simt_fiber.h"

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned first = 1, unsigned second = 1, unsigned third = 1)
      : x(first), y(second), z(third) {}
};

namespace simt {

constexpr unsigned kWarp = 32;

// A fault of the kernel.
struct fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  uint64_t seed = 0;         // of the order in which threads take turns; 0: one after the other
  size_t stack = 256 << 10;  // bytes for each thread, taken only when used
  int64_t most_spins = 2e7;  // turns of waiting loops without progress, then they wait for ever
};

enum class State : uint8_t { ready, at_block, at_warp, at_grid, done };

// An asynchronous copy that was started and not waited for; see simt_instructions.h.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Block;

struct Fiber {
  Context context;
  Block* block = nullptr;
  uint3 thread{};
  unsigned index = 0;  // of the thread in its block
  State state = State::ready;
  const char* site = nullptr;                // the block barrier at which it waits
  std::vector<std::vector<Copy>> copies{1};  // by group; the last is still open
  std::vector<void*> polled;                 // by atomics since its last fence
  bool fenced = false;                       // since its last barrier
};

// What the last lane to arrive at a warp operation does for all: the data that each lane brought.
using Combine = void (*)(void* const* data, unsigned lanes);

// Lanes that wait for each other.
struct Group {
  unsigned mask = 0, arrived = 0;
  Combine combine = nullptr;
  Edge edge;
};

struct Warp {
  unsigned live = 0;
  void* data[kWarp] = {};
  Group groups[kWarp];  // by the lowest lane of their mask
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<char, Free>;

struct Block {
  uint3 index{};
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Memory dynamic_shared;
  std::vector<Memory> static_shared;  // by declaration
  unsigned live = 0, waiting = 0;
  int votes[2] = {};  // at the barrier, by turn
  Edge edge;
};

struct Launch {
  Options options;
  dim3 grid, block;
  std::function<void()> body;
  std::vector<Block> blocks;
  std::vector<Fiber*> ready;
  size_t next = 0;  // in ready
  Fiber* running = nullptr;
  Context main;
  std::string error;
  uint64_t random = 0;
  unsigned live = 0, waiting = 0;  // waiting: for the grid
  int64_t spins = 0;
  char start = 0;
  Edge edge;
};

inline Launch* launched = nullptr;  // one launch at a time
inline Launch& now() { return *launched; }
inline Fiber& running() { return *launched->running; }

// Thrown to leave the threads of a faulty launch.
struct Unwind {};

inline std::string who(const Fiber& f) {
  const uint3 b = f.block->index, t = f.thread;
  return "block " + std::to_string(b.x) + " thread (" + std::to_string(t.x) + "," +
         std::to_string(t.y) + "," + std::to_string(t.z) + ")";
}

inline void note(const std::string& error) {
  if (now().error.empty()) now().error = error;
}

[[noreturn]] inline void fail(const std::string& error) {
  note(error);
  throw Unwind{};
}

inline uint64_t random_bits() {  // xorshift64 (Marsaglia 2003)
  uint64_t& s = now().random;
  s ^= s << 13;
  s ^= s >> 7;
  s ^= s << 17;
  return s;
}

inline void make_ready(Fiber& f) {
  f.state = State::ready;
  now().ready.push_back(&f);
  now().spins = 0;
}

inline Fiber* next_fiber() {
  Launch& l = now();
  if (l.next == l.ready.size()) return nullptr;
  if (l.options.seed != 0) {
    const size_t chosen = l.next + random_bits() % (l.ready.size() - l.next);
    std::swap(l.ready[l.next], l.ready[chosen]);
  }
  Fiber* f = l.ready[l.next++];
  if (l.next > 4096 && l.next * 2 > l.ready.size()) {
    l.ready.erase(l.ready.begin(), l.ready.begin() + static_cast<std::ptrdiff_t>(l.next));
    l.next = 0;
  }
  return f;
}

constexpr size_t kGuard = 4 << 10;      // bytes at the end of a stack whose use ends the program
constexpr size_t kMostGuarded = 16384;  // stacks
constexpr size_t kLeast = 16 << 10;     // bytes of a stack that must be free where its thread waits

inline bool overflows(const Fiber& f) {
  const char* limit = static_cast<const char*>(f.context.bottom) + kLeast;
  return static_cast<const char*>(__builtin_frame_address(0)) < limit;
}

// Leaves the running fiber until it is its turn again.
inline void wait() {
  Fiber& f = running();
  if (overflows(f)) note("stack overflow, " + who(f));
  change(f.context, now().main, false);
  if (!now().error.empty()) throw Unwind{};
}

inline void yield() {
  now().ready.push_back(&running());
  wait();
}

// In a random order, any operation on what threads share may be overtaken by others.
inline void maybe_yield() {
  const Hide hide;
  if (now().options.seed != 0 && random_bits() % 2 == 0) yield();
}

inline void count_spin() {
  if (++now().spins > now().options.most_spins) {
    fail("livelock: a loop waits for ever, " + who(running()));
  }
}

inline void spin() {
  const Hide hide;
  count_spin();
  yield();
}

// Filled with 0xFF, which is NaN in every format; of exactly this size, for AddressSanitizer.
inline Memory poisoned(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, bytes) != 0) throw std::bad_alloc();
  std::memset(memory, 0xFF, bytes);
  return Memory(static_cast<char*>(memory));
}

void thread_exits(Fiber& f);

inline void enter() {
  SIMT_TSAN(AnnotateIgnoreReadsBegin("", 0);)
  Launch& l = now();
  SIMT_ASAN(__sanitizer_finish_switch_fiber(nullptr, &l.main.bottom, &l.main.bytes);)
  acquire(&l.start);
  const bool starts = l.error.empty();
  SIMT_TSAN(AnnotateIgnoreReadsEnd("", 0);)
  try {
    if (starts) l.body();
  } catch (const Unwind&) {
  } catch (const std::exception& e) {
    note(e.what());
  }
  {
    const Hide hide;
    thread_exits(running());
  }
  change(l.running->context, l.main, true);
  std::abort();  // not reached
}

// Kept from one launch to the next, as most are alike.
class Stacks {
 public:
  Stacks() = default;
  ~Stacks() { clear(); }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  void resize(size_t count, size_t each) {
    if (count * each > bytes_ || each != each_) {
      clear();
      void* memory = mmap(nullptr, count * each, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      memory_ = static_cast<char*>(memory);
      bytes_ = count * each;
      each_ = each;
      // two mappings for each, of the 65530 that Linux grants a process
      for (size_t i = 0; i < std::min(count, kMostGuarded); ++i) {
        if (mprotect(memory_ + i * each, kGuard, PROT_NONE) != 0) throw std::bad_alloc();
      }
    }
    // Fibers never return from their first function, which leaves its frame marked.
    SIMT_ASAN(__asan_unpoison_memory_region(memory_, bytes_);)
  }

  void prepare(Context& c, size_t i) const {
    char* bottom = memory_ + i * each_;
    // not all at the same distance: they would share few sets of the cache
    simt::prepare(c, bottom, each_, bottom + each_ - i % 21 * 192, enter);
  }

 private:
  void clear() {
    if (memory_ != nullptr) munmap(memory_, bytes_);
    memory_ = nullptr;
    bytes_ = 0;
  }

  char* memory_ = nullptr;
  size_t bytes_ = 0, each_ = 0;
};

inline Stacks stacks;
inline std::mutex one_launch;  // at a time

inline void describe_deadlock() {
  std::string waits;
  int shown = 0;
  for (const Block& b : now().blocks) {
    for (const Fiber& f : b.fibers) {
      if (f.state == State::done || shown++ >= 4) continue;
      waits += who(f) + " at " +
               (f.state == State::at_block  ? f.site
                : f.state == State::at_warp ? "a warp operation"
                                            : "a grid barrier") +
               "; ";
    }
  }
  note("deadlock: " + waits + std::to_string(now().live) + " threads left");
}

inline void run(Fiber& f) {
  now().running = &f;
  change(now().main, f.context, false);
}

inline void run_all() {
  const Hide hide;
  Launch& l = now();
  while (Fiber* f = next_fiber()) {
    run(*f);
    if (!l.error.empty()) break;
  }
  if (l.live > 0 && l.error.empty()) describe_deadlock();
  if (l.error.empty()) return;
  for (Block& b : l.blocks) {  // each leaves its kernel, by Unwind
    for (Fiber& f : b.fibers) {
      if (f.state != State::done) run(f);
    }
  }
}

inline void populate(Launch& l, unsigned threads, size_t dynamic_shared) {
  for (unsigned i = 0; i < l.blocks.size(); ++i) {
    Block& b = l.blocks[i];
    b.index = {i % l.grid.x, i / l.grid.x % l.grid.y, i / l.grid.x / l.grid.y};
    b.fibers = std::vector<Fiber>(threads);
    b.warps.resize((threads + kWarp - 1) / kWarp);
    b.live = threads;
    if (dynamic_shared > 0) b.dynamic_shared = poisoned(dynamic_shared);
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& f = b.fibers[t];
      f.block = &b;
      f.index = t;
      f.thread = {t % l.block.x, t / l.block.x % l.block.y, t / l.block.x / l.block.y};
      b.warps[t / kWarp].live |= 1u << t % kWarp;
      stacks.prepare(f.context, size_t{i} * threads + t);
      l.ready.push_back(&f);
    }
  }
}

SIMT_TSAN(inline int races = 0;)

// Runs the body in every thread of the grid. Throws a fault.
template <typename Body>
void launch(dim3 grid, dim3 block, size_t dynamic_shared, const Options& options, Body body) {
  const std::lock_guard<std::mutex> only(one_launch);
  const unsigned blocks = grid.x * grid.y * grid.z, threads = block.x * block.y * block.z;
  stacks.resize(size_t{blocks} * threads, options.stack);
  Launch l;
  l.options = options;
  l.grid = grid;
  l.block = block;
  l.body = body;
  l.random = options.seed * 0x9E3779B97F4A7C15u + 1;
  l.blocks.resize(blocks);
  l.live = blocks * threads;
  populate(l, threads, dynamic_shared);
  SIMT_TSAN(l.main.tsan = __tsan_get_current_fiber(); races = 0;)
  launched = &l;
  release(&l.start);
  run_all();
  launched = nullptr;
  SIMT_TSAN(for (Block& b : l.blocks) {
    for (Fiber& f : b.fibers) __tsan_destroy_fiber(f.context.tsan);
  })
  SIMT_TSAN(if (races > 0 && l.error.empty()) {
    l.error = "data race, reported " + std::to_string(races) + " times above";
  })
  if (!l.error.empty()) {
    throw fault(l.error + " [seed " + std::to_string(options.seed) + "]");
  }
}

}  // namespace simt

// Called by ThreadSanitizer for every race that it reports.
SIMT_TSAN(extern "C"
          __attribute__((weak, no_sanitize_thread)) void __tsan_on_report(void*) { ++simt::races; })
