// y = x W^T + bias for few tokens, W decoded from bit planes on the fly.
//
//     y[m, n] = sum_k x[m, k] * scale[n, k/g] * (level(n, k) - zero[n, k/g]) + bias[n]
//     level   = S << (8-bits)                      (rule round)
//             = (S + 1/2) * 2^(8-bits) - 1/2       (rule prefix; S for 8 bits)
//
// Weights are the A operand (16 rows) of mma.sync.m16n8k16 and tokens its B operand (8 columns): Y = (W X^T)^T.
//
// Weight layout: planes[row tile][k tile][plane][lane][4 words], 64 rows x 64 k to a tile, 512 bytes a plane and tile;
// word r of a lane belongs to the tile's rows 16r .. 16r+15 (decode.cuh has the bits). With lane = 4g + t a lane holds rows
// 16r + g and 16r + 8 + g, and of every 16 k the four that are its part of an A operand: 2t, 2t + 1, 2t + 8, 2t + 9.
// The first BITS + ROUND planes of a tile are read, of any number stored: one 8-bit copy serves all widths.
// scales[row tile][group][8g + 2r + h] (h: row g or g + 8) are read like one more plane, 16 bytes a lane; so are zeros.
//
// A block owns WARPS_N * ROW_TILES row tiles and its share of k; its WARPS_K warps take turns of K_TILES k tiles. Each lane
// copies its own 16-byte pieces of planes and scales into its own slots of shared memory, STAGES turns ahead (cp.async): no
// barrier, and bytes in flight that cost no registers. x is shared by the block: `chunk_tiles` k tiles at a time, the next
// chunk's on its way while one is computed. Partial sums of all warps, and of the blocks of a cluster that split k,
// are added in one fixed order from (distributed) shared memory.
//
// Measured on an H200 (2026-11-22): memory is waited on for 5 % of the time; what counts is the ALU, which does a LOP3 or a
// shift in 2 cycles and stands still for 3 (of 6) while an MMA is issued. docs/kernels.md has the figures.
//
// Limits: sm_80 or newer; K a multiple of 16; group_size a multiple of 16 or 0 (one group a row); k is split over at most 8
// blocks, on sm_90 and newer.
//
// Compiled by NVRTC with these macros (tiles.py, defines):
//   FORMAT       Half | BFloat: x, scales, bias, y
//   BITS         2..8, served width
//   ROUND        1: the slice rounds half up by one more plane (resident weights, rule round, BITS < 8)
//   SHIFT        0: zero is 128 and levels are integers; 1: a constant is added to the levels; 2: and zeros taken off
//   GROUP_SIZE   0 or a multiple of 16
//   TOKEN_TILES  8-token tiles that a block computes
//   ROW_TILES    64-row tiles a warp;  K_TILES  k tiles a turn, 1 or 2;  WARPS_N, WARPS_K  warps along rows and along k
//   STAGES       turns a warp has in flight;  BLOCKS  blocks an SM the registers must allow
#include "decode.cuh"

using T = FORMAT;
using Decode = Decoder<T, BITS, bool(ROUND)>;

constexpr int kPlanes = BITS + ROUND;
constexpr int kWarps = WARPS_N * WARPS_K, kThreads = 32 * kWarps;
constexpr int kTokens = 8 * TOKEN_TILES;
constexpr int kBlockTiles = WARPS_N * ROW_TILES, kRows = 64 * kBlockTiles;
constexpr int kPitch = kRows + 4;    // of a token's partial sums: the lanes of a store hit 32 banks
constexpr int kTurn = 64 * K_TILES;  // k of a turn
// Parts of a turn that share a scale for certain.
constexpr int kPart = GROUP_SIZE % kTurn == 0 ? kTurn : GROUP_SIZE % 64 == 0 ? 64 : GROUP_SIZE % 32 == 0 ? 32 : 16;
constexpr int kParts = kTurn / kPart;
// What a stage of the ring holds for a row tile, in slabs of 16 bytes a lane: planes of each k tile, scales and zeros of each part.
constexpr int kScaleSlab = K_TILES * kPlanes, kZeroSlab = kScaleSlab + kParts, kSlabs = kZeroSlab + (SHIFT == 2 ? 2 * kParts : 0);
constexpr int kStageBytes = ROW_TILES * kSlabs * 512;
constexpr int kRingBytes = kWarps * STAGES * kStageBytes;
constexpr float kUnit = BITS < 5 ? float(1 << (8 - BITS)) : 1.0f;  // a unit of the decoded integers, in levels

struct Params {
  const uint16_t* x;       // (M, K), 16-byte aligned
  const uint4* planes;     // (row_tiles, k_tiles, stored, 32 lanes) of 16 bytes
  const uint4* scales;     // (row_tiles, groups, 64) of FORMAT
  const uint4* zeros;      // (row_tiles, groups, 64) of float, SHIFT 2
  const uint16_t* bias;    // (N,) or null
  uint16_t* y;             // (M, N)
  int M, N, K;
  int row_tiles, k_tiles;  // N and K over 64, rounded up: the planes are padded
  int stored;              // planes a tile in memory, at least BITS + ROUND
  int groups;              // scales a row
  int split_tiles;         // k tiles of one block of the cluster, a multiple of K_TILES
  int chunk_tiles;         // k tiles of x in shared memory at a time: one or at least STAGES turns of all warps
  int inbox;               // where in shared memory the blocks of a cluster leave partial sums for one another
  float shift;             // SHIFT 1, 2: added to each decoded level - 128
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

// The blocks of a cluster: barrier in two halves, and a store to another block's shared memory.
__device__ __forceinline__ void arrive_at_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void store_to_block(int block, float* address, float value) {
#if __CUDA_ARCH__ >= 900
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(uint32_t(__cvta_generic_to_shared(address))), "r"(block));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(remote), "f"(value) : "memory");
#endif
}

__device__ __forceinline__ int group_of(int k) {
  if constexpr (GROUP_SIZE == 0) return 0;
  else return unsigned(k) / GROUP_SIZE;
}

// Where 8 k of a token lie in the [k32 block][token][32 k] of a chunk: four such quarters to a block, in an order that
// differs between pairs of tokens, so that the eight tokens of a matrix that ldmatrix reads meet no bank conflict.
__device__ __forceinline__ int quarter_place(int token, int quarter) { return token * 4 + (quarter ^ (token / 2 % 4)); }

// Starts copying x of some k tiles to shared memory; zeros beyond K.
__device__ __forceinline__ void copy_x(uint32_t shared, const Params& p, int first_token, int tokens, int first_tile, int tiles) {
  const int lines = tiles * 2 * tokens, quarter = threadIdx.x % 4;  // 64 bytes, by four lanes
  constexpr int kStep = kThreads / 4;
  const int step_blocks = kStep / tokens, step_tokens = kStep % tokens;
  int line = threadIdx.x / 4, block = line / tokens, token = line % tokens;
  for (; line < lines; line += kStep) {
    const int k = first_tile * 64 + block * 32 + quarter * 8;
    const uint16_t* from = p.x + size_t(first_token + token) * p.K + (k < p.K ? k : 0);
    const uint32_t to = shared + (block * tokens * 4 + quarter_place(token, quarter)) * 16;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(k < p.K ? 16 : 0) : "memory");
    block += step_blocks, token += step_tokens;
    if (token >= tokens) token -= tokens, ++block;
  }
}

// Four 8x8 matrices, a row's address from each lane: this lane's part of four B operand registers.
__device__ __forceinline__ void load_matrices(uint32_t* b, uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(row)
               : "memory");
}

// sum += the MMA steps of one part of a turn.
__device__ __forceinline__ void multiply_part(float (&sum)[4], int part, const uint32_t (&operand)[4 * K_TILES][4],
                                              const uint32_t (&b)[8 * K_TILES]) {
#pragma unroll
  for (int s = part * kPart / 16; s < (part + 1) * kPart / 16; ++s) T::mma(sum, operand[s], b[2 * s], b[2 * s + 1]);
}

// Word r of four, r known at compile time.
__device__ __forceinline__ uint32_t word_of(const uint4& v, int r) { return r == 0 ? v.x : r == 1 ? v.y : r == 2 ? v.z : v.w; }

extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS) matgptq_linear(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int warp_n = warp % WARPS_N, warp_k = warp / WARPS_N;
  const int split = blockIdx.x, splits = gridDim.x;
  const int first_token = blockIdx.y * kTokens, tokens = min(kTokens, p.M - first_token);
  const int first_row = blockIdx.z * kRows;
  if (splits > 1) arrive_at_cluster();  // waited for before the first store to another block: all must be running
  const int k_begin = split * p.split_tiles, k_end = min(k_begin + p.split_tiles, p.k_tiles);

  // Weights do not depend on the previous kernel: start them first.
  unsigned char* const ring = shared + warp * (STAGES * kStageBytes) + lane * 16;
  const uint32_t ring_address = uint32_t(__cvta_generic_to_shared(ring));
  const uint4* planes[ROW_TILES];  // of the next tile to fetch
  const uint4 *scales[ROW_TILES], *zeros[ROW_TILES];
#pragma unroll
  for (int i = 0; i < ROW_TILES; ++i) {
    const size_t row_tile = min(int(blockIdx.z * kBlockTiles) + warp_n * ROW_TILES + i, p.row_tiles - 1);
    planes[i] = p.planes + (row_tile * p.k_tiles + k_begin + warp_k * K_TILES) * p.stored * 32 + lane;
    scales[i] = p.scales + row_tile * p.groups * 8 + g;
    zeros[i] = p.zeros + row_tile * p.groups * 16 + 2 * g;
  }
  auto fetch = [&](int k_tile, int stage_offset) {
    if (k_tile < k_end) {
#pragma unroll
      for (int i = 0; i < ROW_TILES; ++i) {
        const uint32_t to = ring_address + stage_offset + i * kSlabs * 512;
#pragma unroll
        for (int k = 0; k < K_TILES; ++k) {
          if (k > 0 && k_tile + k == p.k_tiles) break;  // what is left in the ring meets zeros of x
#pragma unroll
          for (int plane = 0; plane < kPlanes; ++plane)
            copy_weights(to + (k * kPlanes + plane) * 512, planes[i] + (k * p.stored + plane) * 32);
        }
        planes[i] += WARPS_K * K_TILES * 32 * p.stored;
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
  };
  constexpr int kStride = WARPS_K * K_TILES;  // k tiles from a warp's turn to its next
  int k_tile = k_begin + warp_k * K_TILES;
  const uint32_t x_address = uint32_t(__cvta_generic_to_shared(shared)) + kRingBytes;
  const int x_bytes = p.chunk_tiles * tokens * 128;
  auto fetch_x = [&](int chunk, int buffer) {
    const int tiles = (min(p.chunk_tiles, k_end - chunk) + K_TILES - 1) / K_TILES * K_TILES;
    copy_x(x_address + buffer * x_bytes, p, first_token, tokens, chunk, tiles);
  };
  // x queues behind all that is asked for before it, so it goes second.
#pragma unroll
  for (int s = 0; s < STAGES; ++s) {
    fetch(k_tile + s * kStride, s * kStageBytes);
    if (s == 0) {
      wait_for_previous_grid();
      let_next_grid_start();
      fetch_x(k_begin, 0);
    }
    commit_copies();
  }

  float acc[ROW_TILES][4][TOKEN_TILES][4] = {};
  int stage_offset = 0, buffer = 0;
  for (int chunk = k_begin; chunk < k_end; chunk += p.chunk_tiles, buffer ^= 1) {
    const int chunk_end = min(chunk + p.chunk_tiles, k_end);
    // This chunk's x was asked for with the first turn's weights, or with the last chunk's first fetch, STAGES turns ago.
    wait_copies<STAGES - 1>();
    __syncthreads();  // all threads' copies have landed, and the last chunk has been read
    if (chunk_end < k_end) fetch_x(chunk_end, buffer ^ 1);
    const uint32_t x = x_address + buffer * x_bytes;

    for (; k_tile < chunk_end; k_tile += kStride) {
      uint32_t b[TOKEN_TILES][8 * K_TILES];  // the B operands of step s: b[.][2s], b[.][2s + 1]
#pragma unroll
      for (int j = 0; j < TOKEN_TILES; ++j) {
        // Columns beyond the last token may hold anything: they are computed alone and not stored.
        const uint32_t row = x + ((k_tile - chunk) * 8 * tokens + quarter_place(min(j * 8 + lane % 8, tokens - 1), lane / 8)) * 16;
#pragma unroll
        for (int block = 0; block < 2 * K_TILES; ++block) load_matrices(&b[j][block * 4], row + block * tokens * 64);
      }
      // What all rows share: the operands' bases taken off, and the sum of the tokens' x, which a shift of the levels multiplies.
      float start[TOKEN_TILES][kParts][4] = {}, sum[TOKEN_TILES][kParts][4] = {};
      {
        uint32_t bases[4 * K_TILES][4], ones[4 * K_TILES][4];
#pragma unroll
        for (int s = 0; s < 4 * K_TILES; ++s) {
          Decode::bases(s, bases[s]);
          ones[s][0] = ones[s][1] = ones[s][2] = ones[s][3] = T::kOne;
        }
#pragma unroll
        for (int j = 0; j < TOKEN_TILES; ++j) {
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            if constexpr (!Decode::kCentred) multiply_part(start[j][part], part, bases, b[j]);
            if constexpr (SHIFT > 0) multiply_part(sum[j][part], part, ones, b[j]);
            if constexpr (SHIFT > 0) {
#pragma unroll
              for (int e = 0; e < 4; ++e) start[j][part][e] += p.shift / kUnit * sum[j][part][e];
            }
          }
        }
      }

      wait_copies<STAGES - 1>();
#pragma unroll
      for (int i = 0; i < ROW_TILES; ++i) {
        auto slab = [&](int index) { return *reinterpret_cast<const uint4*>(ring + stage_offset + (i * kSlabs + index) * 512); };
        uint4 words[K_TILES * kPlanes], scale_words[kParts];
#pragma unroll
        for (int index = 0; index < K_TILES * kPlanes; ++index) words[index] = slab(index);
#pragma unroll
        for (int part = 0; part < kParts; ++part) scale_words[part] = slab(kScaleSlab + part);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          uint32_t operand[4 * K_TILES][4];
#pragma unroll
          for (int k = 0; k < K_TILES; ++k) {
            uint32_t unit[kPlanes];
#pragma unroll
            for (int plane = 0; plane < kPlanes; ++plane) unit[plane] = word_of(words[k * kPlanes + plane], r);
            Decode::decode(unit, operand + 4 * k);
          }
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            const uint32_t pair = word_of(scale_words[part], r);
            const float scale[2] = {T::to_float(uint16_t(pair)), T::to_float(uint16_t(pair >> 16))};
            float zero[2] = {};
            if constexpr (SHIFT == 2) {
              const uint4 zero_words = slab(kZeroSlab + 2 * part + r / 2);
              zero[0] = __uint_as_float(word_of(zero_words, r % 2 * 2)) / kUnit;
              zero[1] = __uint_as_float(word_of(zero_words, r % 2 * 2 + 1)) / kUnit;
            }
#pragma unroll
            for (int j = 0; j < TOKEN_TILES; ++j) {
              float dot[4];
#pragma unroll
              for (int e = 0; e < 4; ++e) dot[e] = start[j][part][e];
              multiply_part(dot, part, operand, b[j]);
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                if constexpr (SHIFT == 2) dot[e] -= zero[e / 2] * sum[j][part][e];
                acc[i][r][j][e] += scale[e / 2] * dot[e];
              }
            }
          }
        }
      }
      fetch(k_tile + STAGES * kStride, stage_offset);
      commit_copies();  // empty groups keep the count
      stage_offset = stage_offset == (STAGES - 1) * kStageBytes ? 0 : stage_offset + kStageBytes;
    }
  }

  // Partial sums, [warp_k][token][row], over the ring and the chunk: all copies have landed and all warps are done with them.
  wait_copies<0>();
  __syncthreads();
  float* const partial = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int j = 0; j < TOKEN_TILES; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int token = j * 8 + t * 2 + e % 2, row = (warp_n * ROW_TILES + i) * 64 + r * 16 + e / 2 * 8 + g;
          if (token < tokens) partial[(warp_k * kTokens + token) * kPitch + row] = acc[i][r][j][e];
        }
  __syncthreads();
  auto store = [&](int i, float sum) {
    const int token = i / kRows, n = first_row + i % kRows;
    if (n >= p.N) return;
    sum *= kUnit;
    if (p.bias) sum += T::to_float(p.bias[n]);
    p.y[size_t(first_token + token) * p.N + n] = T::from_float(sum);
  };
  const int outputs = tokens * kRows, share = (outputs + splits - 1) / splits;  // a block of the cluster finishes its share
  float* const inbox = reinterpret_cast<float*>(shared + p.inbox);              // [split][share]
  if (splits > 1) wait_for_cluster();
  for (int i = threadIdx.x; i < outputs; i += kThreads) {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < WARPS_K; ++k) sum += partial[(k * kTokens + i / kRows) * kPitch + i % kRows];
    if (splits == 1) {
      store(i, sum);
    } else {
      const int owner = unsigned(i) / unsigned(share);
      store_to_block(owner, inbox + split * share + i - owner * share, sum);
    }
  }
  if (splits == 1) return;
  arrive_at_cluster();
  wait_for_cluster();
  for (int i = threadIdx.x; i < share && split * share + i < outputs; i += kThreads) {
    float sum = 0;
    for (int k = 0; k < splits; ++k) sum += inbox[k * share + i];
    store(split * share + i, sum);
  }
}
