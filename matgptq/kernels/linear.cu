// y = x W^T + bias for few tokens, W decoded from bit planes on the fly; call.cuh has the equation,
// layouts, limits and macros.
//
// Weights are the A operand (16 rows) of mma.sync.m16n8k16 and tokens its B operand (8 columns): Y = (W X^T)^T.
//
// x is shared by the block: `chunk_tiles` k tiles at a time, the next chunk's on its way while one is computed.
//
// Measured on an H200 (2026-11-22): memory is waited on for 5 % of the time; what counts is the ALU, which does a LOP3 or a
// shift in 2 cycles and stands still for 3 (of 6) while an MMA is issued. docs/kernels.md has the figures.
#include "stream.cuh"

using Decode = Decoder<T, BITS, bool(ROUND)>;

constexpr int kTokens = 8 * TOKEN_TILES;
constexpr float kUnit = Decode::kUnit;

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

// sum += the MMA steps of one part of a turn.
__device__ __forceinline__ void multiply_part(float (&sum)[4], int part, const uint32_t (&operand)[4 * K_TILES][4],
                                              const uint32_t (&b)[8 * K_TILES]) {
#pragma unroll
  for (int s = part * kPart / 16; s < (part + 1) * kPart / 16; ++s) T::mma(sum, operand[s], b[2 * s], b[2 * s + 1]);
}

extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS) matgptq_linear(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char memory[];
  unsigned char* const shared = memory + kFactorBytes;
  float* const factors = reinterpret_cast<float*>(memory);
  const Place at(p, kTokens);
  const int k_begin = at.k_begin, k_end = at.k_end, tokens = at.tokens;
  if (at.splits > 1) open_inbox(p, at, shared);

  // Weights do not depend on the previous kernel: start them first.
  prefetch_weights(p, at);
  Ring ring(p, at, shared);
  int k_tile = k_begin + at.warp_k * K_TILES;
  const uint32_t x_address = uint32_t(__cvta_generic_to_shared(shared)) + kRingBytes;
  const int x_bytes = p.chunk_tiles * tokens * 128;
  auto fetch_x = [&](int chunk, int buffer) {
    const int tiles = (min(p.chunk_tiles, k_end - chunk) + K_TILES - 1) / K_TILES * K_TILES;
    copy_x(x_address + buffer * x_bytes, p, at.first_token, tokens, chunk, tiles);
  };
  // x queues behind all that is asked for before it, so it goes second.
#pragma unroll
  for (int s = 0; s < STAGES; ++s) {
    ring.fetch(k_tile + s * kStride, s * kStageBytes);
    if (s == 0) {
      wait_for_previous_grid();
      fetch_x(k_begin, 0);
    }
    commit_copies();
  }
  if constexpr (SCALED) load_factors(p.norm, p.K, at.first_token, tokens, at.warp, kWarps, factors);

  float acc[ROW_TILES][4][TOKEN_TILES][4] = {};
  int stage_offset = 0, buffer = 0;
  for (int chunk = k_begin; chunk < k_end; chunk += p.chunk_tiles, buffer ^= 1) {
    const int chunk_end = min(chunk + p.chunk_tiles, k_end);
    // This chunk's x was asked for with the first turn's weights, or with the last chunk's first fetch, STAGES turns ago.
    wait_copies<STAGES - 1>();
    __syncthreads();  // all threads' copies have landed, and the last chunk has been read
    if (chunk == k_begin) let_next_grid_start();  // its weights would delay this x
    if (chunk_end < k_end) fetch_x(chunk_end, buffer ^ 1);
    const uint32_t x = x_address + buffer * x_bytes;

    for (; k_tile < chunk_end; k_tile += kStride) {
      uint32_t b[TOKEN_TILES][8 * K_TILES];  // the B operands of step s: b[.][2s], b[.][2s + 1]
#pragma unroll
      for (int j = 0; j < TOKEN_TILES; ++j) {
        // Columns beyond the last token may hold anything: they are computed alone and not stored.
        const uint32_t row = x + ((k_tile - chunk) * 8 * tokens + quarter_place(min(j * 8 + at.lane % 8, tokens - 1), at.lane / 8)) * 16;
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
        uint4 words[K_TILES * kPlanes], scale_words[kParts];
#pragma unroll
        for (int index = 0; index < K_TILES * kPlanes; ++index) words[index] = ring.slab(stage_offset, i, index);
#pragma unroll
        for (int part = 0; part < kParts; ++part) scale_words[part] = ring.slab(stage_offset, i, kScaleSlab + part);
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
              const uint4 zero_words = ring.slab(stage_offset, i, kZeroSlab + 2 * part + r / 2);
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
      ring.fetch(k_tile + STAGES * kStride, stage_offset);
      commit_copies();  // empty groups keep the count
      stage_offset = next_stage(stage_offset);
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
          const int token = j * 8 + at.t * 2 + e % 2, row = (at.warp_n * ROW_TILES + i) * 64 + r * 16 + e / 2 * 8 + at.g;
          if (token < tokens) partial[(at.warp_k * kTokens + token) * kPitch + row] = acc[i][r][j][e];
        }
  __syncthreads();
  finish(p, at, shared, kTokens, kUnit, factors);
}
