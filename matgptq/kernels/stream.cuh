// What linear.cu and few.cu share: a block's place in the problem, the ring that its weights stream through, and the sum of its
// warps' partial sums. call.cuh has the equation, the layout of the weights, limits and macros.
//
// A block owns WARPS_N * ROW_TILES row tiles, GATED as many of one layer as of the other, and its share of k; its WARPS_K warps
// take turns of K_TILES k tiles. Each lane copies its own 16-byte pieces of planes and scales, which are read like one more
// plane, into its own slots of shared memory, STAGES turns ahead (cp.async): no barrier, and bytes in flight that cost no
// registers. Partial sums of all warps, and of the blocks of a cluster that split k (at most 8, on sm_90 and newer), are added
// in one fixed order from (distributed) shared memory.
//
// Further macros:
//   TOKEN_TILES  8-token tiles that a block of linear.cu computes
//   ROW_TILES    64-row tiles a warp;  K_TILES  k tiles a turn, 1 or 2;  WARPS_N, WARPS_K  warps along rows and along k
//   STAGES       turns a warp has in flight;  BLOCKS  blocks an SM the registers must allow
//   GATED        1: see call.cuh; N is then a multiple of 64, and WARPS_N * ROW_TILES even
//   SUMMED, SCALED  1: see norm.cuh; N is then a multiple of 16, and the blocks of a cluster finish at least 16 outputs each
#pragma once
#include "call.cuh"

constexpr int kWarps = WARPS_N * WARPS_K, kThreads = 32 * kWarps;
constexpr int kBlockTiles = WARPS_N * ROW_TILES, kRows = 64 * kBlockTiles;
constexpr int kHalves = GATED ? 2 : 1;  // layers that an output takes a sum of
constexpr int kOutputTiles = kBlockTiles / kHalves, kOutputs = kRows / kHalves;
static_assert(kBlockTiles % kHalves == 0);
static_assert(!(SUMMED && GATED));
constexpr int kFactorBytes = SCALED ? 128 : 0;  // shared memory of a block begins with its tokens' factors
constexpr int kPitch = kRows + 4;    // of a token's partial sums: the lanes of a store hit 32 banks
constexpr int kTurn = 64 * K_TILES;  // k of a turn
// Parts of a turn that share a scale for certain.
constexpr int kPart = GROUP_SIZE % kTurn == 0 ? kTurn : GROUP_SIZE % 64 == 0 ? 64 : GROUP_SIZE % 32 == 0 ? 32 : 16;
constexpr int kParts = kTurn / kPart;
// What a stage of the ring holds for a row tile, in slabs of 16 bytes a lane: planes of each k tile, scales and zeros of each part.
constexpr int kScaleSlab = K_TILES * kPlanes, kZeroSlab = kScaleSlab + kParts, kSlabs = kZeroSlab + (SHIFT == 2 ? 2 * kParts : 0);
constexpr int kStageBytes = ROW_TILES * kSlabs * 512;
constexpr int kRingBytes = kWarps * STAGES * kStageBytes;

// Word r of four, r known at compile time.
__device__ __forceinline__ uint32_t word_of(const uint4& v, int r) { return r == 0 ? v.x : r == 1 ? v.y : r == 2 ? v.z : v.w; }

constexpr int kStride = WARPS_K * K_TILES;  // k tiles from a warp's turn to its next

// A block's and a thread's place in the problem.
struct Place {
  int lane, warp, g, t, warp_n, warp_k;
  int split, splits, k_begin, k_end;  // of k in k tiles
  int first_token, tokens, first_row;

  __device__ Place(const Params& p, int most_tokens) {
    lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    warp_n = warp % WARPS_N, warp_k = warp / WARPS_N;
    split = blockIdx.x, splits = gridDim.x;
    first_token = blockIdx.y * most_tokens, tokens = min(most_tokens, p.M - first_token);
    first_row = blockIdx.z * kOutputs;
    k_begin = split * p.split_tiles, k_end = min(k_begin + p.split_tiles, p.k_tiles);
  }
};

// A lane's slots in the ring, and what goes there next.
struct Ring {
  const Params& p;
  const int k_end;
  unsigned char* const slots;
  const uint32_t address;
  const uint4 *planes[ROW_TILES], *scales[ROW_TILES], *zeros[ROW_TILES];

  __device__ Ring(const Params& p, const Place& at, unsigned char* shared)
      : p(p), k_end(at.k_end), slots(shared + at.warp * (STAGES * kStageBytes) + at.lane * 16),
        address(uint32_t(__cvta_generic_to_shared(slots))) {
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) {
      const int tile = at.warp_n * ROW_TILES + i;  // of the block
      const size_t row_tile =
          min(int(blockIdx.z * kOutputTiles) + tile % kOutputTiles, p.row_tiles - 1) + tile / kOutputTiles * p.row_tiles;
      planes[i] = p.planes + (row_tile * p.k_tiles + at.k_begin + at.warp_k * K_TILES) * p.stored * 32 + at.lane;
      scales[i] = p.scales + row_tile * p.groups * 8 + at.g;
      zeros[i] = p.zeros + row_tile * p.groups * 16 + 2 * at.g;
    }
  }

  // Starts copying the warp's next turn, that of k_tile, if there is one.
  __device__ __forceinline__ void fetch(int k_tile, int stage_offset) {
    if (k_tile >= k_end) return;
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) {
      const uint32_t to = address + stage_offset + i * kSlabs * 512;
#pragma unroll
      for (int k = 0; k < K_TILES; ++k) {
        if (k > 0 && k_tile + k == p.k_tiles) break;  // what is left in the ring meets zeros of x
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane)
          copy_weights(to + (k * kPlanes + plane) * 512, planes[i] + (k * p.stored + plane) * 32);
      }
      planes[i] += kStride * 32 * p.stored;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        int group = group_of(k_tile * 64 + part * kPart);
        if constexpr (kParts > 1) group = min(group, p.groups - 1);  // K may end inside the turn
        copy_scales(to + (kScaleSlab + part) * 512, scales[i] + group * 8);
        if constexpr (SHIFT == 2) {
          copy_scales(to + (kZeroSlab + 2 * part) * 512, zeros[i] + group * 16);
          copy_scales(to + (kZeroSlab + 2 * part + 1) * 512, zeros[i] + group * 16 + 1);
        }
      }
    }
  }

  // Slab `index` of row tile i in a turn that has landed.
  __device__ __forceinline__ uint4 slab(int stage_offset, int i, int index) const {
    return *reinterpret_cast<const uint4*>(slots + stage_offset + (i * kSlabs + index) * 512);
  }
};

__device__ __forceinline__ int next_stage(int stage_offset) {
  return stage_offset == (STAGES - 1) * kStageBytes ? 0 : stage_offset + kStageBytes;
}

// Threads finish outputs by fours, neighbours along rows: a "quad" is such four of a token.
constexpr int kTokenQuads = kOutputs / 4;

// The blocks of a cluster each finish a share of the quads, a power of two of them (`share_bits`), in their order: of three blocks
// the first two may finish all. The others' sums of it come to a block's inbox, [split][half][share] in its shared memory, behind a
// barrier that counts the bytes.

// Opens the inbox. All blocks of a cluster have opened theirs after wait_for_cluster().
__device__ __forceinline__ void open_inbox(const Params& p, const Place& at, unsigned char* shared) {
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) {
    const int own = max(min(at.tokens * kTokenQuads - (at.split << p.share_bits), 1 << p.share_bits), 0);
    const uint32_t barrier = uint32_t(__cvta_generic_to_shared(shared + p.inbox));
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(at.splits * kHalves * own * 16)
                 : "memory");
  }
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void send(int block, uint32_t barrier, uint32_t address, const float (&v)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b32 to, counter;\n"
      "mapa.shared::cluster.u32 to, %0, %2;\nmapa.shared::cluster.u32 counter, %1, %2;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], {%3, %4, %5, %6}, [counter];\n}" ::"r"(address),
      "r"(barrier), "r"(block), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
      : "memory");
#endif
}
__device__ __forceinline__ void wait_for_inbox(uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  uint32_t full = 0;
  while (!full) {
    asm volatile(
        "{\n.reg .pred full;\nmbarrier.try_wait.parity.shared::cta.b64 full, [%1], 0;\nselp.u32 %0, 1, 0, full;\n}"
        : "=r"(full)
        : "r"(barrier)
        : "memory");
  }
#endif
}

__device__ __forceinline__ void add_to(float (&sum)[4], const float4& v) { sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w; }

// SUMMED: what is added to a quad, and multiplies it.
struct Addend {
  uint2 residual, weight;

  __device__ __forceinline__ Addend(const Params& p, const Place& at, int quad) : residual(), weight() {
    const int token = quad / kTokenQuads, n = at.first_row + quad % kTokenQuads * 4;
    if (!SUMMED || token >= at.tokens || n >= p.N) return;
    residual = *reinterpret_cast<const uint2*>(p.norm.residual + size_t(at.first_token + token) * p.N + n);
    weight = *reinterpret_cast<const uint2*>(p.norm.weight + n);
  }
};

// SUMMED: asks for the weights of the block's rows to come to the L2: a step has read them a step ago.
__device__ __forceinline__ void prefetch_weights(const Params& p, const Place& at) {
  constexpr int kLine = 64;  // of 128 bytes
  const int n = at.first_row + threadIdx.x * kLine;
  if (SUMMED && threadIdx.x < kOutputs / kLine && n < p.N) asm volatile("prefetch.global.L2 [%0];" ::"l"(p.norm.weight + n));
}

// Adds up partial sums, [warp_k][most_tokens][row] from the start of shared memory, of the block's warps and of the cluster's
// blocks, and stores y: `unit` times the sums, and with SCALED times their tokens' `factors`.
__device__ __forceinline__ void finish(const Params& p, const Place& at, unsigned char* shared, int most_tokens, float unit,
                                       const float* factors) {
  const int quads = at.tokens * kTokenQuads, first = at.split << p.share_bits;
  const Addend early(p, at, first + threadIdx.x);  // of the thread's first quad, which is often its only one
  auto store = [&](int quad, const float (&sums)[kHalves][4]) {
    const int token = quad / kTokenQuads, n = at.first_row + quad % kTokenQuads * 4, rows = p.N - n;  // from here to the end
    if (rows <= 0) return;
    const float factor = SCALED ? unit * factors[token] : unit;
    uint32_t y[kHalves][2];
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      float v[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        v[e] = sums[half][e] * factor;
        if (p.bias && e < rows) v[e] += T::to_float(p.bias[n + e + half * p.N]);
      }
      y[half][0] = T::from_floats(v[0], v[1]), y[half][1] = T::from_floats(v[2], v[3]);
    }
    if constexpr (GATED) y[0][0] = gated<T>(y[0][0], y[1][0]), y[0][1] = gated<T>(y[0][1], y[1][1]);
    uint16_t* const to = p.y + size_t(at.first_token + token) * p.N + n;
    if constexpr (SUMMED) {
      const Addend with = quad == first + threadIdx.x ? early : Addend(p, at, quad);
      const uint32_t sum[2] = {add<T>(y[0][0], with.residual.x), add<T>(y[0][1], with.residual.y)};
      y[0][0] = T::mul2(sum[0], with.weight.x), y[0][1] = T::mul2(sum[1], with.weight.y);
      *reinterpret_cast<uint2*>(p.norm.sum + (to - p.y)) = make_uint2(sum[0], sum[1]);
      store_mean(p.norm, p.N, at.first_token + token, n, squares_of<T>(sum[0]) + squares_of<T>(sum[1]));
    }
    if (GATED || SUMMED || p.N % 4 == 0) {
      *reinterpret_cast<uint2*>(to) = make_uint2(y[0][0], y[0][1]);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (e < rows) to[e] = uint16_t(y[0][e / 2] >> (e % 2 * 16));
    }
  };
  const float4* const partial = reinterpret_cast<const float4*>(shared);
  const float4* const inbox = reinterpret_cast<const float4*>(shared + p.inbox + 16);
  const uint32_t barrier = uint32_t(__cvta_generic_to_shared(shared)) + p.inbox;
  if (at.splits > 1) wait_for_cluster();
  for (int quad = threadIdx.x; quad < quads; quad += kThreads) {
    float sums[kHalves][4] = {};
#pragma unroll
    for (int half = 0; half < kHalves; ++half)
#pragma unroll
      for (int k = 0; k < WARPS_K; ++k)
        add_to(sums[half],
               partial[(k * most_tokens + quad / kTokenQuads) * (kPitch / 4) + half * kTokenQuads + quad % kTokenQuads]);
    if (at.splits == 1) {
      store(quad, sums);
    } else {
      const int owner = quad >> p.share_bits, place = quad - (owner << p.share_bits);
#pragma unroll
      for (int half = 0; half < kHalves; ++half)
        send(owner, barrier, barrier + 16 + (((at.split * kHalves + half) << p.share_bits) + place) * 16, sums[half]);
    }
  }
  if (at.splits == 1) return;
  wait_for_inbox(barrier);
  for (int i = threadIdx.x; i < min(quads - first, 1 << p.share_bits); i += kThreads) {
    float sums[kHalves][4] = {};
    for (int k = 0; k < at.splits; ++k)
#pragma unroll
      for (int half = 0; half < kHalves; ++half) add_to(sums[half], inbox[((k * kHalves + half) << p.share_bits) + i]);
    store(first + i, sums);
  }
}
