// What the kernels for all GPUs share: the parameters of a call, copies, and the order of calls.
//
//     y[m, n] = sum_k x[m, k] * scale[n, k/g] * (level(n, k) - zero[n, k/g]) + bias[n]
//     level   = S << (8-bits)                      (rule round)
//             = (S + 1/2) * 2^(8-bits) - 1/2       (rule prefix; S for 8 bits)
//
// GATED: the weights are those of two layers of N rows, one after the other, and y = silu(first) * second, their results being
// rounded to FORMAT as if they had been stored.
//
// SUMMED, SCALED: RMSNorm of y + residual is shared with the call after, or with the one before (norm.cuh).
//
// Weight layout: planes[row tile][k tile][plane][lane][4 words], 64 rows x 64 k to a tile, 512 bytes a plane and tile;
// word r of a lane belongs to the tile's rows 16r .. 16r+15 (decode.cuh has the bits). With lane = 4g + t a lane holds rows
// 16r + g and 16r + 8 + g, and of every 16 k the four that are its part of an A operand: 2t, 2t + 1, 2t + 8, 2t + 9.
// The first BITS + ROUND planes of a tile are read, of any number stored: one 8-bit copy serves all widths.
// scales[row tile][group][8g + 2r + h] (h: row g or g + 8), zeros alike.
//
// Limits: sm_80 or newer; K a multiple of 16; group_size a multiple of 16 or 0 (one group a row).
//
// Compiled by NVRTC with these macros (tiles.py, defines), and some of the kernel's own:
//   FORMAT       Half | BFloat: x, scales, bias, y
//   BITS         2..8, served width
//   ROUND        1: the slice rounds half up by one more plane (resident weights, rule round, BITS < 8)
//   SHIFT        0: zero is 128 and levels are integers; 1: a constant is added to the levels; 2: and zeros taken off
//   GROUP_SIZE   0 or a multiple of 16
#pragma once
#include "norm.cuh"

using T = FORMAT;

constexpr int kPlanes = BITS + ROUND;

struct Params {
  const uint16_t* x;       // (M, K), 16-byte aligned
  const uint4* planes;     // (row_tiles, k_tiles, stored, 32 lanes) of 16 bytes; these and what follows twice if GATED
  const uint4* scales;     // (row_tiles, groups, 64) of FORMAT
  const uint4* zeros;      // (row_tiles, groups, 64) of float, SHIFT 2
  const uint16_t* bias;    // (N,) or null
  uint16_t* y;             // (M, N)
  int M, N, K;
  int row_tiles, k_tiles;  // N and K over 64, rounded up: the planes are padded
  int stored;              // planes a tile in memory, at least BITS + ROUND
  int groups;              // scales a row
  int split_tiles;         // k tiles of one block of the cluster, a multiple of K_TILES
  int chunk_tiles;         // linear.cu: k tiles of x in shared memory at a time, all or at least STAGES turns of all warps
  int inbox;               // where in shared memory the blocks of a cluster leave partial sums for one another, and a barrier
  int share_bits;          // each block of a cluster finishes 2^share_bits times 4 outputs
  float shift;             // SHIFT 1, 2: added to each decoded level - 128
  SharedNorm norm;
};

// Weights are read once and pass the L1 by; scales, which neighbouring k tiles share, stay in it.
__device__ __forceinline__ void copy_weights(uint32_t shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
__device__ __forceinline__ void copy_scales(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Four 8x8 matrices, a row's address from each lane: this lane's part of four B operand registers.
__device__ __forceinline__ void load_matrices(uint32_t* b, uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(row)
               : "memory");
}

// Programmatic dependent launch: before wait_for_previous_grid() only weights, scales, zeros and bias may be touched.
__device__ __forceinline__ void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_grid_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ int group_of(int k) {
  if constexpr (GROUP_SIZE == 0) return 0;
  else return unsigned(k) / GROUP_SIZE;
}
