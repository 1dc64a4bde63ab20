// Instructions that CUDA C++ has no words for, each with a plain twin for the emulator.
//
//   cp_async_*    copies from global to shared memory that go on in the background
//   ldmatrix_x4   four matrices of 8 x 8 numbers of two bytes, from shared memory to a warp
//   mma_16816     D += A B on the tensor cores; A is 16 x 16, B 16 x 8, D 16 x 8 in float
//
// Which lane holds what ("PTX ISA", sections on ldmatrix and mma.m16n8k16), g = lane / 4 and
// t = lane % 4; a register has two numbers, of places 2 t and 2 t + 1:
//
//   ldmatrix  r[m]  row g of matrix m, columns 2 t ..       transposed: column g, rows 2 t ..
//   A         a[0] row g,     columns 2 t ..     a[1] row g + 8, columns 2 t ..
//             a[2] row g,     columns 2 t + 8 ..  a[3] row g + 8, columns 2 t + 8 ..
//   B         b[0] column g, rows 2 t ..          b[1] column g, rows 2 t + 8 ..
//   D         d[0], d[1] row g, columns 2 t ..    d[2], d[3] row g + 8, columns 2 t ..
#pragma once

#include <cstdint>

#include "cuda/device.h"

#if !defined(__CUDACC__)
#include "simt_instructions.h"
#endif

namespace tb::gpu {

// The emulator counts what is read of the weights.
__device__ inline void count_weight_bytes(int64_t bytes) {
#if defined(__CUDACC__)
  (void)bytes;
#else
  simt::count_weights(static_cast<uint64_t>(bytes));
#endif
}

template <typename T>
__device__ inline T load_counted(const T* from) {
  count_weight_bytes(static_cast<int64_t>(sizeof(T)));
  return *from;
}

// threadIdx.x, read anew: what a compiler works out from it is not kept in registers across the
// loops of a kernel with many phases.
__device__ inline int fresh_thread_index() {
#if defined(__CUDACC__)
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
#else
  return static_cast<int>(threadIdx.x);
#endif
}

#if defined(__CUDACC__)

__device__ inline unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Starts copying `bytes` <= 16 and fills up to 16 with zeros. Both addresses are multiples of 16.
__device__ inline void cp_async_16(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}

// Ends a group of copies of this thread.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits for all groups of this thread but the last kPending.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// row: this lane's row of matrix lane / 8, a multiple of 16
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

template <typename T>
__device__ inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
__device__ inline void mma_16816<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ inline void mma_16816<__half>(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#else

__device__ inline void cp_async_16(void* shared, const void* global, int bytes) {
  count_weight_bytes(bytes);
  simt::copy_later(shared, global, bytes);
}
__device__ inline void cp_async_commit() { simt::commit_copies(); }
template <int kPending>
__device__ inline void cp_async_wait() {
  simt::wait_for_copies(kPending);
}
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  simt::load_matrices(r, row, false);
}
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  simt::load_matrices(r, row, true);
}
template <typename T>
__device__ inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  simt::multiply_add<T>(d, a, b);
}

#endif

}  // namespace tb::gpu
