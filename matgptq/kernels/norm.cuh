// RMSNorm (arXiv 1910.07467) of a sum, as a transformer's layers take it before q, k and v and before gate and up, shared by the
// calls around it, so that it takes no kernel of its own. The call before (SUMMED) adds and multiplies:
//
//     sum   = y + residual                                           rounded to FORMAT
//     z     = sum * norm                                             in the place of y
//     means = sum of sum^2 of each kMeanRows rows of a token, over N; eps is in the first
//
// The call after (SCALED) takes z as its x, and multiplies its results by what follows from all of a token:
//
//     factor = 1 / sqrt(sum of means)
//
// In bfloat16 only: z is not normalised yet, and might be too large or too small for float16.
#pragma once
#include "decode.cuh"

constexpr int kMeanRows = 16;

struct SharedNorm {
  float* means;              // SUMMED (M, N / kMeanRows), SCALED (M, K / kMeanRows)
  const uint16_t* residual;  // SUMMED (M, N)
  const uint16_t* weight;    // SUMMED (N,): norm
  uint16_t* sum;             // SUMMED (M, N)
  float eps;                 // SUMMED
};

// Pairs of x + residual.
template <typename T>
__device__ __forceinline__ uint32_t add(uint32_t x, uint32_t residual) {
  return T::from_floats(T::to_float(uint16_t(x)) + T::to_float(uint16_t(residual)),
                        T::to_float(uint16_t(x >> 16)) + T::to_float(uint16_t(residual >> 16)));
}

// The sum of the squares of a pair.
template <typename T>
__device__ __forceinline__ float squares_of(uint32_t pair) {
  const float low = T::to_float(uint16_t(pair)), high = T::to_float(uint16_t(pair >> 16));
  return fmaf(high, high, low * low);
}

// Stores the mean of a token's kMeanRows rows from n on, of which each of four neighbouring lanes has some.
__device__ __forceinline__ void store_mean(const SharedNorm& norm, int N, int token, int n, float squares) {
  const unsigned lanes = 0xFu << threadIdx.x % 32 / 4 * 4;
  squares += __shfl_xor_sync(lanes, squares, 1);
  squares += __shfl_xor_sync(lanes, squares, 2);
  if (threadIdx.x % 4 == 0) norm.means[size_t(token) * (N / kMeanRows) + n / kMeanRows] = squares / N + (n < kMeanRows ? norm.eps : 0);
}

// Writes the factors of the tokens from `first` on to shared memory; a warp, of `warps`, takes every so many of them.
__device__ __forceinline__ void load_factors(const SharedNorm& norm, int K, int first, int tokens, int warp, int warps, float* factors) {
  const int means = K / kMeanRows, lane = threadIdx.x % 32;
  for (int token = warp; token < tokens; token += warps) {
    const float* const from = norm.means + size_t(first + token) * means;
    float sum = 0;
#pragma unroll 1
    for (int begin = lane; begin < means; begin += 8 * 32) {
      float v[8];  // asked for before the first is added
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        v[i] = 0;
        if (begin + i * 32 < means) asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v[i]) : "l"(from + begin + i * 32) : "memory");
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) sum += v[i];
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    if (lane == 0) factors[token] = rsqrtf(sum);
  }
}
