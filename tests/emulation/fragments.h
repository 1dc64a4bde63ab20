// The twins of ldmatrix and mma against the layout in the PTX ISA, 9.7.14 "Warp-level matrix
// instructions": which row and column the element i of a fragment has in a thread, as the manual
// writes it. Entries are multiples of 1/8 below 2, so that products and sums are exact.
#pragma once

#include <cstring>
#include <random>

#include "cuda/instructions.h"

namespace fragments {

struct Place {
  int row, column;
};

// m16n8k16, .f16 and .bf16
inline Place place_in_a(int lane, int i) {
  const int group = lane >> 2, thread_in_group = lane % 4;
  return {(0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8,
          i < 4 ? thread_in_group * 2 + (i & 1) : thread_in_group * 2 + (i & 1) + 8};
}
inline Place place_in_b(int lane, int i) {
  const int group = lane >> 2, thread_in_group = lane % 4;
  return {i < 2 ? thread_in_group * 2 + (i & 1) : thread_in_group * 2 + (i & 1) + 8, group};
}
inline Place place_in_d(int lane, int i) {
  const int group = lane >> 2, thread_in_group = lane % 4;
  return {i < 2 ? group : group + 8, thread_in_group * 2 + (i & 1)};
}

inline void set(__nv_bfloat16& to, float v) { to = __float2bfloat16_rn(v); }
inline void set(__half& to, float v) { to = __float2half_rn(v); }

template <typename T>
struct Registers {
  T a[32][8], b[32][4];
  float d[32][4];
};

template <typename T>
__global__ void multiply(Registers<T>* all) {
  const unsigned l = threadIdx.x;
  uint32_t a[4], b[2];
  std::memcpy(a, all->a[l], sizeof(a));
  std::memcpy(b, all->b[l], sizeof(b));
  tb::gpu::mma_16816<T>(all->d[l], a, b);
}

template <typename T>
bool mma_is_right(unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_int_distribution<int> eighths(-15, 15);
  float a[16][16], b[16][8], d[16][8];
  for (auto& row : a) {
    for (float& v : row) v = static_cast<float>(eighths(random)) / 8;
  }
  for (auto& row : b) {
    for (float& v : row) v = static_cast<float>(eighths(random)) / 8;
  }
  for (auto& row : d) {
    for (float& v : row) v = static_cast<float>(eighths(random)) / 8;
  }
  Registers<T> all;
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 8; ++i) {
      const Place p = place_in_a(lane, i);
      set(all.a[lane][i], a[p.row][p.column]);
    }
    for (int i = 0; i < 4; ++i) {
      const Place in_b = place_in_b(lane, i), in_d = place_in_d(lane, i);
      set(all.b[lane][i], b[in_b.row][in_b.column]);
      all.d[lane][i] = d[in_d.row][in_d.column];
    }
  }
  simt::Options options;
  options.seed = seed;
  SIMT_LAUNCH(multiply<T>, dim3(1), dim3(32), 0, options, &all);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const Place p = place_in_d(lane, i);
      double exact = d[p.row][p.column];
      for (int k = 0; k < 16; ++k) exact += double{a[p.row][k]} * double{b[k][p.column]};
      if (all.d[lane][i] != exact) return false;
    }
  }
  return true;
}

// Row r of matrix m lies where thread 8 m + r points, here anywhere in shared memory.
__global__ inline void load(const uint16_t* values, const int* rows, uint32_t* plain,
                            uint32_t* transposed) {
  TB_SHARED(uint16_t, shared, [32 * 8]);
  const unsigned l = threadIdx.x;
  for (int i = 0; i < 8; ++i) shared[rows[l] * 8 + i] = values[l * 8 + static_cast<unsigned>(i)];
  __syncthreads();
  uint32_t r[4];
  tb::gpu::ldmatrix_x4(r, &shared[rows[l] * 8]);
  std::memcpy(plain + 4 * l, r, sizeof(r));
  tb::gpu::ldmatrix_x4_trans(r, &shared[rows[l] * 8]);
  std::memcpy(transposed + 4 * l, r, sizeof(r));
}

inline bool ldmatrix_is_right(unsigned seed) {
  std::mt19937 random(seed);
  uint16_t values[32 * 8];
  int rows[32];
  for (auto& v : values) v = static_cast<uint16_t>(random());
  for (int i = 0; i < 32; ++i) rows[i] = i;
  std::shuffle(rows, rows + 32, random);
  uint16_t plain[32][4][2], transposed[32][4][2];
  simt::Options options;
  options.seed = seed;
  SIMT_LAUNCH(load, dim3(1), dim3(32), 0, options, values, rows, reinterpret_cast<uint32_t*>(plain),
              reinterpret_cast<uint32_t*>(transposed));
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < 4; ++m) {
      for (int i = 0; i < 2; ++i) {
        const int row = lane / 4, column = 2 * (lane % 4) + i;
        if (plain[lane][m][i] != values[(8 * m + row) * 8 + column]) return false;
        if (transposed[lane][m][i] != values[(8 * m + column) * 8 + row]) return false;
      }
    }
  }
  return true;
}

}  // namespace fragments
