// Switching between stacks, and what the sanitizers must be told about it.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#error "the emulator switches stacks on x86-64 only"
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define SIMT_ASAN(...) __VA_ARGS__
#else
#define SIMT_ASAN(...)
#endif

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define SIMT_TSAN(...) __VA_ARGS__
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#else
#define SIMT_TSAN(...)
#endif

namespace simt {

// While it lives, accesses to memory are the emulator's, not the kernel's: no race detection.
class Hide {
 public:
  Hide() {
    SIMT_TSAN(AnnotateIgnoreReadsBegin("", 0);)
    SIMT_TSAN(AnnotateIgnoreWritesBegin("", 0);)
  }
  ~Hide() {
    SIMT_TSAN(AnnotateIgnoreWritesEnd("", 0);)
    SIMT_TSAN(AnnotateIgnoreReadsEnd("", 0);)
  }
  Hide(const Hide&) = delete;
  Hide& operator=(const Hide&) = delete;
};

// What came before a release of an object happens before what comes after an acquire of it.
inline void release([[maybe_unused]] void* object) { SIMT_TSAN(__tsan_release(object);) }
inline void acquire([[maybe_unused]] void* object) { SIMT_TSAN(__tsan_acquire(object);) }

// An order from all that arrive at a barrier to all that leave it. Those that have left may arrive
// at the next one before the last has left, hence two.
class Edge {
 public:
  int arrive() {
    release(&objects_[turn_]);
    return turn_;
  }
  void open() { turn_ ^= 1; }
  void leave(int turn) { acquire(&objects_[turn]); }

 private:
  char objects_[2] = {};
  int turn_ = 0;
};

// Saves the registers that a call must preserve on this stack and takes those of another.
extern "C" void simt_switch(void** save_stack_pointer, void* stack_pointer);
asm(R"(
.text
.weak simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
)");

struct Context {
  void* stack_pointer = nullptr;
  const void* bottom = nullptr;  // of its stack: the lowest address
  size_t bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan = nullptr;        // ThreadSanitizer's
};

// Makes a context that will start in `entry`, which must not return, with an empty stack that ends
// at `top`.
inline void prepare(Context& c, char* bottom, size_t bytes, char* top, void (*entry)()) {
  c.bottom = bottom;
  c.bytes = bytes;
  void** frame = reinterpret_cast<void**>(top);
  *--frame = nullptr;  // where entry would return to, and its alignment
  *--frame = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--frame = nullptr;
  c.stack_pointer = frame;
  SIMT_TSAN(c.tsan = __tsan_create_fiber(0);)
}

// Leaves `from` for `to`; returns when another leaves for `from`, never if it ends here.
SIMT_TSAN(__attribute__((no_sanitize_thread)))
inline void change(Context& from, const Context& to, [[maybe_unused]] bool ends) {
  SIMT_ASAN(__sanitizer_start_switch_fiber(ends ? nullptr : &from.fake_stack, to.bottom, to.bytes);)
  // what a fiber did happens before what comes after its end
  SIMT_TSAN(__tsan_switch_to_fiber(to.tsan, ends ? 0 : __tsan_switch_to_fiber_no_sync);)
  simt_switch(&from.stack_pointer, to.stack_pointer);
  SIMT_ASAN(__sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);)
}

}  // namespace simt
