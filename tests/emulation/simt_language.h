// The words of CUDA C++ that kernels use, in terms of the emulator.
#pragma once

#include <type_traits>

#include "simt_numbers.h"
#include "simt_sync.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

#define threadIdx (simt::running().thread)
#define blockIdx (simt::running().block->index)
#define blockDim (simt::now().block)
#define gridDim (simt::now().grid)

// Runs a kernel to its end: dim3 grid, dim3 block, bytes of dynamic shared memory, simt::Options,
// arguments. Throws simt::fault.
#define SIMT_LAUNCH(kernel, grid, block, dynamic_shared, options, ...) \
  simt::launch((grid), (block), (dynamic_shared), (options), [&] { kernel(__VA_ARGS__); })

#define SIMT_SPIN() simt::spin()

// ---- shared memory -----------------------------------------------------------------------------

namespace simt {

// Declarations of static shared memory in the whole program are numbered; each has its own Tag.
inline size_t declarations = 0;
template <typename Tag>
inline const size_t declaration_of = declarations++;

// One object for each block and declaration.
template <typename T, typename Tag>
T& static_shared(Tag) {
  const Hide hide;
  const size_t declaration = declaration_of<Tag>;
  std::vector<Memory>& all = running().block->static_shared;
  if (all.size() <= declaration) all.resize(declaration + 1);
  if (all[declaration] == nullptr) all[declaration] = poisoned(sizeof(T));
  return *reinterpret_cast<T*>(all[declaration].get());
}

template <typename T>
T* dynamic_shared() {
  const Hide hide;
  return reinterpret_cast<T*>(running().block->dynamic_shared.get());
}

}  // namespace simt

// The type is that of `type name dimensions;`: an array of any rank, or none.
#define SIMT_SHARED(type, name, ...)                                                            \
  using name##_element = type;                                                                  \
  using name##_type = std::remove_pointer_t<decltype((name##_element(*) __VA_ARGS__) nullptr)>; \
  name##_type& name = simt::static_shared<name##_type>([] {})
#define SIMT_DYN_SHARED(type, name) type* name = simt::dynamic_shared<type>()

// ---- barriers ----------------------------------------------------------------------------------

#define SIMT_TEXT_OF(x) #x
#define SIMT_TEXT(x) SIMT_TEXT_OF(x)
#define SIMT_SITE __FILE__ ":" SIMT_TEXT(__LINE__)

#define __syncthreads() static_cast<void>(simt::block_barrier(SIMT_SITE, false))
#define __syncthreads_count(p) simt::block_barrier(SIMT_SITE, (p) != 0)
#define __syncthreads_or(p) static_cast<int>(simt::block_barrier(SIMT_SITE, (p) != 0) > 0)
#define __syncthreads_and(p) \
  static_cast<int>(simt::whole_block(simt::block_barrier(SIMT_SITE, (p) != 0)))

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  simt::warp_operation(mask, nullptr, simt::nothing, true);
}

namespace cooperative_groups {
struct grid_group {
  void sync() const { simt::grid_barrier(); }
};
inline grid_group this_grid() { return {}; }
}  // namespace cooperative_groups

inline void __threadfence() { simt::fence(); }
inline void __threadfence_block() { simt::fence(); }
inline void __threadfence_system() { simt::fence(); }

// ---- warp operations ---------------------------------------------------------------------------

// `width` is a power of two: lanes talk within groups of so many.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned w = static_cast<unsigned>(width), first = simt::lane() & ~(w - 1);
  return simt::shuffle(mask, value, first + (static_cast<unsigned>(source) & (w - 1)));
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const unsigned w = static_cast<unsigned>(width), l = simt::lane();
  const unsigned source = l ^ static_cast<unsigned>(bits);
  return simt::shuffle(mask, value, source < (l & ~(w - 1)) + w ? source : l);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned apart, int width = 32) {
  const unsigned w = static_cast<unsigned>(width), l = simt::lane();
  return simt::shuffle(mask, value, (l & (w - 1)) >= apart ? l - apart : l);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned apart, int width = 32) {
  const unsigned w = static_cast<unsigned>(width), l = simt::lane();
  return simt::shuffle(mask, value, (l & (w - 1)) + apart < w ? l + apart : l);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return simt::ballot(mask, predicate != 0).in_favour;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) {
  const simt::Ballot found = simt::ballot(mask, predicate != 0);
  return found.in_favour == found.voters;
}

// ---- atomics -----------------------------------------------------------------------------------

// type_identity: atomicAdd(float*, 1) takes its type from the pointer
template <typename T>
T atomicAdd(T* word, std::type_identity_t<T> value) {
  return simt::atomic(word, [=](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicMax(T* word, std::type_identity_t<T> value) {
  return simt::atomic(word, [=](T old) { return std::max(old, value); });
}
template <typename T>
T atomicMin(T* word, std::type_identity_t<T> value) {
  return simt::atomic(word, [=](T old) { return std::min(old, value); });
}
template <typename T>
T atomicOr(T* word, std::type_identity_t<T> value) {
  return simt::atomic(word, [=](T old) { return static_cast<T>(old | value); });
}
template <typename T>
T atomicExch(T* word, std::type_identity_t<T> value) {
  return simt::atomic(word, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* word, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return simt::atomic(word, [=](T old) { return old == expected ? value : old; });
}
