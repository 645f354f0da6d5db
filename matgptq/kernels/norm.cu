// RMSNorm of a sum where the calls around it do not share it (norm.cuh): in float16, and of more tokens. A block has a token.
//
//     sum = x + residual                                             rounded to FORMAT
//     z   = sum / sqrt(mean(sum^2) + eps) * norm                     rounded before the product too, as by ops of their own
//
// Limits: K a multiple of kMeanRows. Compiled by NVRTC with FORMAT, Half | BFloat: x, residual, norm, sum, z.
#include "norm.cuh"

using T = FORMAT;

constexpr int kThreads = 512, kWarps = kThreads / 32;

struct Params {
  const uint4* x;         // (M, K)
  const uint4* residual;  // (M, K)
  const uint4* norm;      // (K,)
  float* means;           // (M, K / kMeanRows): sums of 1, as z is normalised
  uint4* sum;             // (M, K)
  uint4* z;               // (M, K)
  int M, K;
  float eps;
};

extern "C" __global__ void __launch_bounds__(kThreads) matgptq_norm(const __grid_constant__ Params p) {
  // `norm`, which a step has read a step ago, is asked for while the kernel before still runs: one vector a thread comes to stay,
  // the others to the L2.
  const int vectors = p.K / 8;
  const size_t first = size_t(blockIdx.x) * vectors;
  const uint4 first_norm = threadIdx.x < vectors ? p.norm[threadIdx.x] : uint4{};
  for (int i = kThreads + threadIdx.x; i < vectors; i += kThreads) asm volatile("prefetch.global.L2 [%0];" ::"l"(p.norm + i));
#if __CUDA_ARCH__ >= 900
  // With 3 to 8 tokens linear.cu is next, which took longer so (docs/kernels.md).
  const bool early = p.M > 8;
  if (early) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (!early) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
  float squares = 0;
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    const uint4 a = p.x[first + i], b = p.residual[first + i];
    const uint4 sum = make_uint4(add<T>(a.x, b.x), add<T>(a.y, b.y), add<T>(a.z, b.z), add<T>(a.w, b.w));
    squares += squares_of<T>(sum.x) + squares_of<T>(sum.y) + squares_of<T>(sum.z) + squares_of<T>(sum.w);
    p.sum[first + i] = sum;
  }
  for (int i = threadIdx.x; i < p.K / kMeanRows; i += kThreads) p.means[size_t(blockIdx.x) * (p.K / kMeanRows) + i] = i == 0;
  // Sums of a thread's k, of a warp's, of the block's, each in one order.
  extern __shared__ float shared[];  // one a warp
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) squares += __shfl_xor_sync(~0u, squares, lanes);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = squares;
  __syncthreads();
  squares = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) squares += shared[i];
  const float factor = rsqrtf(squares / p.K + p.eps);
  auto scaled = [&](uint32_t sum, uint32_t norm) {
    const float low = T::to_float(uint16_t(sum)) * factor, high = T::to_float(uint16_t(sum >> 16)) * factor;
    return T::mul2(T::from_floats(low, high), norm);
  };
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    const uint4 sum = p.sum[first + i], norm = i < kThreads ? first_norm : p.norm[i];
    p.z[first + i] = make_uint4(scaled(sum.x, norm.x), scaled(sum.y, norm.y), scaled(sum.z, norm.z), scaled(sum.w, norm.w));
  }
}
