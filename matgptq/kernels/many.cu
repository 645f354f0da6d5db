// y = x W^T + bias for many tokens by mma.sync, on GPUs that hopper.cu is not for; call.cuh has the equation, layouts, limits and
// macros.
//
// Weights are the A operand (16 rows) of mma.sync.m16n8k16 and tokens its B operand (8 columns). A warp decodes two words of a row
// tile, 32 rows, once for all tokens of the block. A block owns two row tiles, two warps to each, and all of k. Planes, scales
// and x come a k tile at a time into a ring, STAGES - 1 ahead (cp.async); the block shares them.
//
// A weight's base and middle are taken off exactly, in 16 bits; then it is scaled, with one rounding, and sums run through all of
// K. With zeros, weights are made in fp32. y passes through shared memory, and is stored by whole rows.
//
// Further macros:
//   TOKENS  of a block, a multiple of 32
//   STAGES  k tiles in the ring, at least 2;  BLOCKS  blocks an SM the registers must allow
#include "call.cuh"

using Decode = Decoder<T, BITS, bool(ROUND), true>;

constexpr int kRowTiles = 2, kThreads = 64 * kRowTiles, kRows = 64 * kRowTiles;
constexpr int kPart = GROUP_SIZE % 64 == 0 ? 64 : GROUP_SIZE % 32 == 0 ? 32 : 16;  // k that share a scale for certain
constexpr int kParts = 64 / kPart;
// A stage of the ring: x, rows of 128 bytes; planes of each row tile; scales and zeros of each part and row tile.
constexpr int kPlanesAt = TOKENS * 128, kScalesAt = kPlanesAt + kRowTiles * kPlanes * 512;
constexpr int kZerosAt = kScalesAt + kParts * kRowTiles * 128;
constexpr int kStageBytes = kZerosAt + (SHIFT == 2 ? kParts * kRowTiles * 256 : 0);
constexpr int kPitch = kRows + 8;  // of a token's y in shared memory: the lanes of a store hit all banks
constexpr int kBand = 16;          // blocks along rows that run at a time, to share x in the L2
static_assert(TOKENS % 32 == 0 && STAGES > 1);

// What a thread copies of a k tile. All of it is found again each time: there are no registers to keep it in.
struct Source {
  const Params& p;
  const uint32_t ring;
  const int row_block, token_block;

  static __device__ __forceinline__ int thread() {
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));
    return thread;
  }

  __device__ __forceinline__ void fetch_weights(int k_tile, int stage) const {
    const int tile = thread() / 64, index = thread() % 64;  // one of the 64 threads of the block's row tile `tile`
    const int row_tile = min(row_block * kRowTiles + tile, p.row_tiles - 1);
    const uint32_t to = ring + stage * kStageBytes;
    const uint4* const planes = p.planes + (size_t(row_tile) * p.k_tiles + k_tile) * p.stored * 32 + index;
#pragma unroll
    for (int plane = 0; plane < kPlanes; plane += 2)
      if (plane + 1 < kPlanes || index < 32)
        copy_weights(to + kPlanesAt + (tile * kPlanes + plane) * 512 + index * 16, planes + plane * 32);
    auto copy_parts = [&](uint32_t to, const uint4* from, int pieces) {  // `pieces` of 16 bytes a part
      if (index >= kParts * pieces) return;
      const int part = index / pieces, group = min(group_of(k_tile * 64 + part * kPart), p.groups - 1);  // K may end inside
      copy_scales(to + ((part * kRowTiles + tile) * pieces + index % pieces) * 16,
                  from + (size_t(row_tile) * p.groups + group) * pieces + index % pieces);
    };
    copy_parts(to + kScalesAt, p.scales, 8);
    if constexpr (SHIFT == 2) copy_parts(to + kZerosAt, p.zeros, 16);
  }

  // The 16-byte pieces of a token lie in an order of its own, so that ldmatrix meets no bank conflict; zeros beyond M and K.
  __device__ __forceinline__ void fetch_x(int k_tile, int stage) const {
    constexpr int kStep = kThreads / 8;
    const int piece = thread() % 8, token = thread() / 8, k = k_tile * 64 + piece * 8, m = token_block * TOKENS + token;
    const uint16_t* from = p.x + size_t(m) * p.K + k;
    const uint32_t to = ring + stage * kStageBytes + token * 128 + (piece ^ token % 8) * 16;
#pragma unroll
    for (int i = 0; i < TOKENS; i += kStep, from += kStep * p.K) {
      const int bytes = k < p.K && m + i < p.M ? 16 : 0;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + i * 128), "l"(from), "r"(bytes) : "memory");
    }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS) matgptq_linear(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t ring = uint32_t(__cvta_generic_to_shared(shared));
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int tile = threadIdx.x / 64, first_word = threadIdx.x / 32 % 2 * 2;  // of the warp

  // Blocks in bands of kBand along rows, then along tokens.
  const int row_blocks = (p.row_tiles + kRowTiles - 1) / kRowTiles, token_blocks = (p.M + TOKENS - 1) / TOKENS;
  const int band = blockIdx.x / (kBand * token_blocks), rows = min(kBand, row_blocks - band * kBand);
  const int of_band = blockIdx.x - band * kBand * token_blocks;
  const int row_block = band * kBand + of_band % rows, token_block = of_band / rows;

  const Source source{p, ring, row_block, token_block};
  // Weights do not depend on the previous kernel: start them first.
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    if (stage < p.k_tiles) source.fetch_weights(stage, stage);
    if (stage == 0) wait_for_previous_grid();
    if (stage < p.k_tiles) source.fetch_x(stage, stage);
    commit_copies();
  }
  let_next_grid_start();

  float acc[2][TOKENS / 8][4] = {};
  int stage = 0;
#pragma unroll 1
  for (int k_tile = 0; k_tile < p.k_tiles; ++k_tile) {
    wait_copies<STAGES - 2>();
    __syncthreads();  // all threads' copies of this k tile have landed, and the one before has been read
    const int next = k_tile + STAGES - 1, next_stage = stage == 0 ? STAGES - 1 : stage - 1;
    if (next < p.k_tiles) {
      source.fetch_weights(next, next_stage);
      source.fetch_x(next, next_stage);
    }
    commit_copies();  // empty groups keep the count

    const unsigned char* const at = shared + stage * kStageBytes;
    uint2 words[kPlanes];
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane)
      words[plane] = *reinterpret_cast<const uint2*>(at + kPlanesAt + (tile * kPlanes + plane) * 512 + lane * 16 + first_word * 4);
    uint32_t operand[2][4][4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t unit[kPlanes];
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) unit[plane] = r == 0 ? words[plane].x : words[plane].y;
      Decode::decode(unit, operand[r]);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int slot = (part * kRowTiles + tile) * 64 + g * 8 + (first_word + r) * 2;
        Scale scale = Decode::scale<SHIFT>(*reinterpret_cast<const uint32_t*>(at + kScalesAt + slot * 2));
        if constexpr (SHIFT == 2) {
          const float2 zeros = *reinterpret_cast<const float2*>(at + kZerosAt + slot * 4);
          scale.zero[0] = zeros.x, scale.zero[1] = zeros.y;
        }
#pragma unroll
        for (int step = part * kPart / 16; step < (part + 1) * kPart / 16; ++step)
          Decode::weights<SHIFT>(operand[r][step], step, scale, p.shift);
      }
    }
    // A lane's row of four matrices: 8 tokens, 32 k.
    const uint32_t x = ring + stage * kStageBytes + lane % 8 * 128;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t row = x + ((half * 4 + lane / 8) ^ (lane % 8)) * 16;
#pragma unroll
      for (int j = 0; j < TOKENS / 8; ++j) {
        uint32_t b[4];
        load_matrices(b, row + j * 1024);
#pragma unroll
        for (int s = 0; s < 2; ++s)
#pragma unroll
          for (int r = 0; r < 2; ++r) T::mma(acc[r][j], operand[r][half * 2 + s], b[2 * s], b[2 * s + 1]);
      }
    }
    stage = stage == STAGES - 1 ? 0 : stage + 1;
  }

  // y, [token][row], over the ring: all copies have landed and all warps are done with them.
  wait_copies<0>();
  __syncthreads();
  uint16_t* const staged = reinterpret_cast<uint16_t*>(shared);
#pragma unroll
  for (int r = 0; r < 2; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = tile * 64 + (first_word + r) * 16 + h * 8 + g, n = row_block * kRows + row;
      const float bias = p.bias && n < p.N ? T::to_float(p.bias[n]) : 0;
#pragma unroll
      for (int j = 0; j < TOKENS / 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) staged[(j * 8 + t * 2 + e) * kPitch + row] = T::from_float(acc[r][j][h * 2 + e] + bias);
    }
  __syncthreads();
  const int piece = threadIdx.x % (kRows / 8), n = row_block * kRows + piece * 8;
#pragma unroll 1
  for (int token = threadIdx.x / (kRows / 8); token < TOKENS; token += 8) {
    const int m = token_block * TOKENS + token;
    if (m >= p.M || n >= p.N) return;
    const uint16_t* const from = staged + token * kPitch + piece * 8;
    uint16_t* const to = p.y + size_t(m) * p.N + n;
    if (p.N % 8 == 0) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int i = 0; i < min(8, p.N - n); ++i) to[i] = from[i];
    }
  }
}
