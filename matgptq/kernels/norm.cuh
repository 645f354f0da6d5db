// RMSNorm (arXiv 1910.07467) of a sum, as a transformer's layers take it before q, k and v and before gate and up:
//
//     sum = x + residual                                             rounded to FORMAT
//     z   = sum / sqrt(mean(sum^2) + eps) * norm                     the mean over all K of a token
#pragma once
#include "decode.cuh"

// Pairs of x + residual.
template <typename T>
__device__ __forceinline__ uint32_t add(uint32_t x, uint32_t residual) {
  return T::from_floats(T::to_float(uint16_t(x)) + T::to_float(uint16_t(residual)),
                        T::to_float(uint16_t(x >> 16)) + T::to_float(uint16_t(residual >> 16)));
}

template <typename T>
__device__ __forceinline__ uint4 add(const uint4& x, const uint4& residual) {
  return make_uint4(add<T>(x.x, residual.x), add<T>(x.y, residual.y), add<T>(x.z, residual.z), add<T>(x.w, residual.w));
}

// 1 / sqrt(mean(sum^2) + eps) of token `owner` of a block's `tokens`, the first of which is `first`: sums of a thread's k, of a
// warp's, of the block's, each in one order. `shared` has a float for each token and warp, and is free again afterwards.
template <typename T, int Threads, typename Params>
__device__ __forceinline__ float norm_factor(const Params& p, int first, int tokens, int owner, float* shared) {
  constexpr int kWarps = Threads / 32;
  const int vectors = p.K / 8, warp = threadIdx.x / 32;
  for (int token = 0; token < tokens; ++token) {
    const uint4* const x = reinterpret_cast<const uint4*>(p.x) + size_t(first + token) * vectors;
    const uint4* const residual = reinterpret_cast<const uint4*>(p.residual) + size_t(first + token) * vectors;
    float squares = 0;
    constexpr int kAtOnce = 4;  // asked for before the first is added up
    for (int begin = threadIdx.x; begin < vectors; begin += kAtOnce * Threads) {
      uint4 a[kAtOnce] = {}, b[kAtOnce] = {};
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const int i = begin + n * Threads;
        if (i < vectors) a[n] = x[i], b[n] = residual[i];
      }
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n) {
        const uint4 sum = add<T>(a[n], b[n]);
        const uint32_t pairs[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const float v = T::to_float(uint16_t(pairs[e / 2] >> e % 2 * 16));
          squares = fmaf(v, v, squares);
        }
      }
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) squares += __shfl_xor_sync(~0u, squares, lanes);
    if (threadIdx.x % 32 == 0) shared[token * kWarps + warp] = squares;
  }
  __syncthreads();
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) squares += shared[owner * kWarps + i];
  __syncthreads();
  return rsqrtf(squares / p.K + p.eps);
}
