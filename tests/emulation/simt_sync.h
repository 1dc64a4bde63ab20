// How threads of a launch wait for each other and exchange data: barriers, warp operations, fences
// and atomics.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>

#include "simt_scheduler.h"

namespace simt {

// ---- blocks ------------------------------------------------------------------------------------

// Lets the block go on when all its threads wait.
inline void check_block(Block& b) {
  if (b.live == 0 || b.waiting != b.live) return;
  const Fiber* first = nullptr;
  for (const Fiber& f : b.fibers) {
    if (f.state != State::at_block) {
      note("divergent barrier: " + who(f) + " has returned, others of its block wait at " +
           (first != nullptr ? first->site : "a barrier"));
      continue;
    }
    if (first == nullptr) first = &f;
    if (std::strcmp(f.site, first->site) != 0) {
      note("divergent barrier: " + who(f) + " is at " + f.site + ", " + who(*first) + " at " +
           first->site);
    }
  }
  b.waiting = 0;
  b.edge.open();
  for (Fiber& f : b.fibers) {
    if (f.state == State::at_block) make_ready(f);
  }
}

// Waits for the block; the number of its threads whose predicate holds.
inline int block_barrier(const char* site, bool predicate) {
  const Hide hide;
  Fiber& f = running();
  Block& b = *f.block;
  f.fenced = false;
  const int turn = b.edge.arrive();
  if (b.waiting == 0) b.votes[turn] = 0;
  b.votes[turn] += predicate;
  f.state = State::at_block;
  f.site = site;
  ++b.waiting;
  check_block(b);
  wait();
  b.edge.leave(turn);
  return b.votes[turn];
}

inline bool whole_block(int votes) {
  return votes == static_cast<int>(running().block->fibers.size());
}

// ---- the grid ----------------------------------------------------------------------------------

inline void check_grid() {
  Launch& l = now();
  if (l.live == 0 || l.waiting != l.live) return;
  l.waiting = 0;
  l.edge.open();
  for (Block& b : l.blocks) {
    for (Fiber& f : b.fibers) {
      if (f.state == State::at_grid) make_ready(f);
    }
  }
}

inline void grid_barrier() {
  const Hide hide;
  Fiber& f = running();
  f.fenced = false;
  const int turn = now().edge.arrive();
  f.state = State::at_grid;
  ++now().waiting;
  check_grid();
  wait();
  now().edge.leave(turn);
}

// ---- warps -------------------------------------------------------------------------------------

inline unsigned lane() { return running().index % kWarp; }
inline Warp& warp() { return running().block->warps[running().index / kWarp]; }

// Ends a warp operation when all lanes of its mask that have not returned are there.
inline void check_group(Block& b, Warp& w, Group& g) {
  if (g.arrived == 0 || g.arrived != (g.mask & w.live)) return;
  g.combine(w.data, g.arrived);
  const size_t first = static_cast<size_t>(&w - b.warps.data()) * kWarp;
  const unsigned lanes = std::exchange(g.arrived, 0);
  g.edge.open();
  for (unsigned i = 0; i < kWarp; ++i) {
    if ((lanes >> i & 1) != 0) make_ready(b.fibers[first + i]);
  }
}

inline void nothing(void* const*, unsigned) {}

// Waits for the lanes of the mask; the last one runs `combine` on what all of them brought. It
// orders no accesses to memory unless it is told to.
inline void warp_operation(unsigned mask, void* data, Combine combine, bool orders = false) {
  const Hide hide;
  Fiber& f = running();
  Warp& w = warp();
  if ((mask >> lane() & 1) == 0) fail(who(f) + " is not in the mask of its warp operation");
  Group& g = w.groups[__builtin_ctz(mask)];
  if (g.arrived == 0) {
    g.mask = mask;
    g.combine = combine;
  } else if (g.mask != mask || g.combine != combine) {
    fail("divergent warp: " + who(f) + " is at another warp operation than the lanes it names");
  }
  const int turn = orders ? g.edge.arrive() : 0;
  w.data[lane()] = data;
  g.arrived |= 1u << lane();
  f.state = State::at_warp;
  check_group(*f.block, w, g);
  wait();
  if (orders) g.edge.leave(turn);
}

inline void thread_exits(Fiber& f) {
  Block& b = *f.block;
  Warp& w = b.warps[f.index / kWarp];
  f.state = State::done;
  --now().live;
  --b.live;
  w.live &= ~(1u << f.index % kWarp);
  now().spins = 0;
  if (!now().error.empty()) return;
  for (Group& g : w.groups) check_group(b, w, g);
  check_block(b);
  check_grid();
}

template <typename T>
struct Shuffle {
  T value;
  unsigned source;

  // A lane that is not there gives NaN.
  static void combine(void* const* data, unsigned lanes) {
    T values[kWarp];
    std::memset(static_cast<void*>(values), 0xFF, sizeof(values));
    for (unsigned i = 0; i < kWarp; ++i) {
      if ((lanes >> i & 1) != 0) values[i] = static_cast<Shuffle*>(data[i])->value;
    }
    for (unsigned i = 0; i < kWarp; ++i) {
      if ((lanes >> i & 1) == 0) continue;
      auto* mine = static_cast<Shuffle*>(data[i]);
      mine->value = values[mine->source % kWarp];
    }
  }
};

// The value of another lane.
template <typename T>
T shuffle(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= 8, "shuffles take at most 8 bytes");
  Shuffle<T> mine{value, source};
  warp_operation(mask, &mine, Shuffle<T>::combine);
  return mine.value;
}

struct Ballot {
  bool predicate;
  unsigned in_favour, voters;

  static void combine(void* const* data, unsigned lanes) {
    unsigned in_favour = 0;
    for (unsigned i = 0; i < kWarp; ++i) {
      if ((lanes >> i & 1) != 0 && static_cast<Ballot*>(data[i])->predicate) in_favour |= 1u << i;
    }
    for (unsigned i = 0; i < kWarp; ++i) {
      if ((lanes >> i & 1) == 0) continue;
      static_cast<Ballot*>(data[i])->in_favour = in_favour;
      static_cast<Ballot*>(data[i])->voters = lanes;
    }
  }
};

inline Ballot ballot(unsigned mask, bool predicate) {
  Ballot mine{predicate, 0, 0};
  warp_operation(mask, &mine, Ballot::combine);
  return mine;
}

// ---- fences and atomics ------------------------------------------------------------------------

// Atomics order nothing by themselves. What came before a fence, and an atomic after it, happens
// before what follows another thread's atomic on the same word and then a fence.
inline void fence() {
  maybe_yield();
  const Hide hide;
  Fiber& f = running();
  f.fenced = true;
  for (void* word : f.polled) acquire(word);
  f.polled.clear();
}

// Replaces a word by what `change` makes of it; the old one.
template <typename T, typename Change>
T atomic(T* word, Change change) {
  maybe_yield();
  SIMT_TSAN(__atomic_fetch_or(reinterpret_cast<unsigned char*>(word), 0, __ATOMIC_RELAXED);)
  const Hide hide;
  SIMT_TSAN(Fiber& f = running(); if (f.fenced) release(word);
            if (std::count(f.polled.begin(), f.polled.end(), word) == 0) f.polled.push_back(word);)
  const T old = *word;
  *word = change(old);
  if (std::memcmp(word, &old, sizeof(T)) == 0) {  // a loop may be waiting for it to change
    count_spin();
    if (now().spins % 64 == 0) yield();
  }
  return old;
}

}  // namespace simt
