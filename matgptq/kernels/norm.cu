// sum and z of norm.cuh, where the kernel that takes z has not made it itself (NORMED in few.cu). A block has a token.
//
// Limits: K a multiple of 8. Compiled by NVRTC with FORMAT, Half | BFloat: x, residual, norm, sum, z.
#include "norm.cuh"

using T = FORMAT;

constexpr int kThreads = 512;

struct Params {
  const uint4* x;         // (M, K)
  const uint4* residual;  // (M, K)
  const uint4* norm;      // (K,)
  void* unused;           // what linear.cu has there
  uint4* sum;             // (M, K)
  uint4* z;               // (M, K)
  int M, K;
  float eps;
};

extern "C" __global__ void __launch_bounds__(kThreads) matgptq_norm(const __grid_constant__ Params p) {
  extern __shared__ float shared[];  // one a warp
  // `norm`, which a step has read a step ago, is asked for while the kernel before still runs: one vector a thread comes to stay,
  // the others to the L2.
  const int vectors = p.K / 8;
  const uint4 first_norm = threadIdx.x < vectors ? p.norm[threadIdx.x] : uint4{};
  for (int i = kThreads + threadIdx.x; i < vectors; i += kThreads) asm volatile("prefetch.global.L2 [%0];" ::"l"(p.norm + i));
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
  const float factor = norm_factor<T, kThreads>(p, blockIdx.x, 1, 0, shared);
  const size_t first = size_t(blockIdx.x) * vectors;
  // As by ops of their own: rounded before the product with `norm` too.
  auto scaled = [&](uint32_t sum, uint32_t norm) {
    const float low = T::to_float(uint16_t(sum)) * factor, high = T::to_float(uint16_t(sum >> 16)) * factor;
    return T::mul2(T::from_floats(low, high), norm);
  };
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    const uint4 sum = add<T>(p.x[first + i], p.residual[first + i]), norm = i < kThreads ? first_norm : p.norm[i];
    p.sum[first + i] = sum;
    p.z[first + i] = make_uint4(scaled(sum.x, norm.x), scaled(sum.y, norm.y), scaled(sum.z, norm.z), scaled(sum.w, norm.w));
  }
}
