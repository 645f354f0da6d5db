// y = silu(h[:, :N]) * h[:, N:], h the results of two layers side by side, where their kernel has not made y itself (GATED in
// call.cuh). A thread has eight outputs.
//
// Limits: N a multiple of 8, M * N below 2^35. Compiled by NVRTC with FORMAT, Half | BFloat: h, y.
#include "decode.cuh"

using T = FORMAT;

struct Params {
  const uint4* h;   // (M, 2 N)
  void* unused[4];  // what linear.cu has there
  uint4* y;         // (M, N)
  int M, N;
};

extern "C" __global__ void __launch_bounds__(256) matgptq_gate(const __grid_constant__ Params p) {
  const unsigned columns = unsigned(p.N) / 8, i = blockIdx.x * 256 + threadIdx.x, token = i / columns;
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
  if (token >= unsigned(p.M)) return;
  const uint4* const from = p.h + i + size_t(token) * columns;
  const uint4 gate = from[0], up = from[columns];
  p.y[i] = make_uint4(gated<T>(gate.x, up.x), gated<T>(gate.y, up.y), gated<T>(gate.z, up.z), gated<T>(gate.w, up.w));
}
