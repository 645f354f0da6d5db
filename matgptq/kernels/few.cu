// y = x W^T + bias for one or two tokens by integer tensor cores; call.cuh has the equation,
// layouts, limits and macros.
//
// Weights are the A operand (16 rows) of mma.sync.m16n8k32, their codes as bytes: four to an AND, with no base to take off,
// and half as many MMAs as in linear.cu. x is the B operand: a block splits it into three signed digits of fixed-point
// numbers, a chunk of `chunk_tiles` k tiles while it multiplies the one before. A token has four columns: its digits' and one
// that is not used.
//
//     x = unit * (d0 + 2^8 d1 + 2^16 d2) + error,  |error| <= 2^-21 of the largest |x| of a token's 256 k (2^-19 at 2 bits)
//
// A unit is a power of two, so that numbers with few bits stay exact; Inf or NaN makes it NaN, and so may |x| from 2^121 on
// (bfloat16). Where all |x| are below 2^-108 the error is 2^-129. The sums of a part, which is the k of a turn that share a
// scale, are exact in int32 and are begun at the bits of 1.5 * 2^23, which makes them floats without a conversion; then they
// are scaled. Digits are joined at the end.
//
// Measured on an H200 (2026-11-22): 9 % faster than linear.cu in the mean of what `choose` takes it for, 19 % at most. x, which
// must come and be split before the first product, and the sums of a cluster bound small layers, memory large ones.
//
// Limits beside call.cuh's: group_size 0 or a multiple of 32; chunk_tiles a multiple of 4, and chunk_tiles * tokens at most a
// quarter of the threads.
#include "stream.cuh"

using Decode = Bytes<BITS, bool(ROUND)>;

constexpr int kTokens = 2;
constexpr int kDigits = 3;
constexpr int kTileDigits = kDigits * 64;    // bytes of a token's digits of a k tile
constexpr float kMagic = 12582912.0f;        // 1.5 * 2^23: an integer below 2^22 added to its bits is added to it
constexpr float kUnit = BITS < 5 ? 16 : 1;   // a unit of the sums, in levels
constexpr float kUpper = BITS < 5 ? 1 : 16;  // a unit of the upper nibbles' sums, in that
constexpr float kLowerBegin = BITS < 5 ? 0 : kMagic / 16;  // what the lower nibbles' sums begin at, in units of the upper ones'
static_assert(kPart % 32 == 0 && kPart <= 128);  // a part's sums are below 2^22: 128 * 128 * 255

// One step of a sum: sum = start + A B.
__device__ __forceinline__ void multiply(int (&sum)[4], const uint32_t (&a)[4], uint2 b, const int (&start)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=r"(sum[0]), "=r"(sum[1]), "=r"(sum[2]), "=r"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y), "r"(start[0]), "r"(start[1]), "r"(start[2]),
        "r"(start[3]));
}

// Splits x of a chunk: digits[k tile][token][digit][t][j][l] of four bytes (as the A operand's, decode.cuh), units[part][token].
// A task is a token's 8 values of one (k tile, j, t); a thread has at most kTasks. They are asked for a chunk ahead.
class Splitter {
  static constexpr int kTasks = 2;
  const Params& p;
  const Place& at;
  const int of_token, tasks;  // tasks of a token and of all
  uint32_t x[kTasks][2][2];   // [l][u], pairs

 public:
  __device__ Splitter(const Params& p, const Place& at)
      : p(p), at(at), of_token(p.chunk_tiles * 8), tasks(of_token * at.tokens) {}

  // Asks for x from k tile `chunk` on; zeros beyond K.
  __device__ __forceinline__ void load(int chunk) {
#pragma unroll
    for (int n = 0; n < kTasks; ++n) {
      const int task = n * kThreads + threadIdx.x, token = task >= of_token;
      const int k = chunk * 64 + unsigned(task - token * of_token) / 4 * 32 + at.t * 2;
      const uint16_t* from = p.x + size_t(at.first_token + token) * p.K + k;
#pragma unroll
      for (int i = 0; i < 4; ++i) x[n][i / 2][i % 2] = load_pair(from + 8 * i, task < tasks && k + i / 2 * 16 < p.K);
    }
  }

  // Splits what was asked for.
  __device__ __forceinline__ void split(unsigned char* digits, float* units) const {
#pragma unroll
    for (int n = 0; n < kTasks; ++n) {
      if (n * kThreads + at.warp * 32 < tasks) split(digits, units, n * kThreads + threadIdx.x, x[n]);
    }
  }

 private:
  // In its place among the copies, which the compiler else moves it behind.
  static __device__ __forceinline__ uint32_t load_pair(const uint16_t* from, bool inside) {
    uint32_t pair;
    asm volatile("{\n.reg .pred inside;\nsetp.ne.u32 inside, %2, 0;\nmov.u32 %0, 0;\n@inside ld.global.u32 %0, [%1];\n}"
                 : "=r"(pair)
                 : "l"(from), "r"(uint32_t(inside))
                 : "memory");
    return pair;
  }

  __device__ __forceinline__ void split(unsigned char* digits, float* units, int task, const uint32_t (&x)[2][2]) const {
    // The warp's tasks are 256 k of one token. The bits of numbers without a sign are in the order of the numbers, NaN above all.
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) most = __vmaxu2(most, x[i / 2][i % 2] & 0x7FFF7FFFu);
    const float largest = T::to_float(uint16_t(__reduce_max_sync(~0u, max(most & 0xFFFFu, most >> 16))));
    // |x| * factor < 2^20 in units of 1/2, at 2 bits for four times x
    constexpr int kBits = BITS == 2 ? 18 : 20;
    const int exponent = max(int(__float_as_uint(largest) >> 23), 19);  // the factor is finite, four times it too
    const float factor = __uint_as_float((kBits + 253 - exponent) << 23);
    if (task >= tasks) return;
    uint32_t low[2], middle[2], high[2];
#pragma unroll
    for (int l = 0; l < 2; ++l) {
      // The bits of 2^22 + 2^21 + (2^15 + 2^7) / 2, plus x in halves: bytes 0x80 + d0, 0x80 + d1, 0xC0 + d2.
      auto fixed = [&](uint32_t value) {
        const float scale = BITS == 2 && l == 1 ? 4 * factor : factor;
        return __float_as_uint(fmaf(T::to_float(uint16_t(value)), scale, __uint_as_float(0x4AC08080u)));
      };
      const uint32_t b0 = fixed(x[l][0]), b1 = fixed(x[l][1]), b2 = fixed(x[l][0] >> 16), b3 = fixed(x[l][1] >> 16);
      const uint32_t lower01 = __byte_perm(b0, b1, 0x5140), lower23 = __byte_perm(b2, b3, 0x5140);
      const uint32_t upper01 = __byte_perm(b0, b1, 0x0062), upper23 = __byte_perm(b2, b3, 0x0062);
      low[l] = __byte_perm(lower01, lower23, 0x5410) ^ 0x80808080u;
      middle[l] = __byte_perm(lower01, lower23, 0x7632) ^ 0x80808080u;
      high[l] = (__byte_perm(upper01, upper23, 0x5410) - 0x40404040u) ^ 0x80808080u;
    }
    const int token = task >= of_token, half = unsigned(task - token * of_token) / 4;  // 32 k
    uint2* const to = reinterpret_cast<uint2*>(digits + (half / 2 * at.tokens + token) * kTileDigits + at.t * 16) + half % 2;
    to[0] = {low[0], low[1]}, to[8] = {middle[0], middle[1]}, to[16] = {high[0], high[1]};
    if (at.t == 0 && half % (kPart / 32) == 0) {
      const float unit = __uint_as_float(exponent << 23) * (1.0f / (1 << kBits));
      units[half / (kPart / 32) * at.tokens + token] = unit + (largest - largest);  // NaN for NaN and Inf
    }
  }
};

extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS) matgptq_linear(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) unsigned char memory[];
  unsigned char* const shared = memory + kFactorBytes;
  float* const factors = reinterpret_cast<float*>(memory);
  const Place at(p, kTokens);
  if (at.splits > 1) open_inbox(p, at, shared);

  // Two chunks of x: digits and units.
  const int digits_bytes = p.chunk_tiles * at.tokens * kTileDigits;
  const int chunk_bytes = digits_bytes + p.chunk_tiles * 64 / kPart * at.tokens * 4;
  unsigned char *digits = shared + kRingBytes, *next_digits = digits + (chunk_bytes + 15) / 16 * 16;
  auto units_of = [&](unsigned char* digits) { return reinterpret_cast<float*>(digits + digits_bytes); };

  // Weights do not depend on the previous kernel: the whole ring is asked for first. The next kernel, which asks for its own,
  // may start when x has come.
  prefetch_weights(p, at);
  Ring ring(p, at, shared);
  Splitter splitter(p, at);
  int k_tile = at.k_begin + at.warp_k * K_TILES, stage_offset = 0;
#pragma unroll
  for (int s = 0; s < STAGES; ++s) {
    ring.fetch(k_tile + s * kStride, s * kStageBytes);
    commit_copies();
  }
  wait_for_previous_grid();
  splitter.load(at.k_begin);
  if constexpr (SCALED) load_factors(p.norm, p.K, at.first_token, at.tokens, at.warp, kWarps, factors);
  splitter.split(digits, units_of(digits));
  let_next_grid_start();

  // The columns of the B operand: those of token 0 and those of token 1, the fourth anything.
  const int place = min(at.g / 4, at.tokens - 1) * kTileDigits + min(at.g % 4, kDigits - 1) * 64 + at.t * 16;
  const int owner = min(at.t / 2, at.tokens - 1);  // of the two columns that this lane has sums of
  int begin[4];
  uint32_t middle[4];
  Decode::middle(middle);
#pragma unroll
  for (int e = 0; e < 4; ++e) begin[e] = __float_as_int(kMagic);

  float acc[ROW_TILES][4][4] = {};
  for (int chunk = at.k_begin; chunk < at.k_end; chunk += p.chunk_tiles) {
    const int chunk_end = min(chunk + p.chunk_tiles, at.k_end);
    __syncthreads();  // this chunk's digits stand, the last chunk's have been read
    if (chunk_end < at.k_end) splitter.load(chunk_end);
    const float* const units = units_of(digits);

    for (; k_tile < chunk_end; k_tile += kStride) {
      uint2 b[2 * K_TILES];  // the B operands of 32 k
#pragma unroll
      for (int k = 0; k < K_TILES; ++k) {
        const uint4 v = *reinterpret_cast<const uint4*>(digits + (k_tile - chunk + k) * at.tokens * kTileDigits + place);
        b[2 * k] = {v.x, v.y}, b[2 * k + 1] = {v.z, v.w};
      }
      // A part's sums as floats, times `unit`, plus `offset`, are x times weights: of row g, and 16 times those of row g + 8.
      float unit[kParts], offset[kParts][2][2], sum[kParts][2];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        int base[4];
#pragma unroll
        for (int s = part * kPart / 32; s < (part + 1) * kPart / 32; ++s)
          multiply(base, middle, b[s], s * 32 % kPart == 0 ? begin : base);
        unit[part] = units[((k_tile - chunk) * 64 / kPart + part) * at.tokens + owner];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float upper = __int_as_float(base[e]), lower = __int_as_float(base[2 + e]);
          offset[part][0][e] = -(upper + kLowerBegin) * (kUpper * unit[part]);
          offset[part][1][e] = (upper - lower) * (kUpper * unit[part]);
          sum[part][e] = (upper - kMagic) / 8 * unit[part];
        }
      }

      wait_copies<STAGES - 1>();
#pragma unroll
      for (int i = 0; i < ROW_TILES; ++i) {
        int dots[4][Decode::kOperands][4];
#pragma unroll
        for (int s = 0; s < 2 * K_TILES; s += 2) {
          uint4 words[kPlanes];
#pragma unroll
          for (int plane = 0; plane < kPlanes; ++plane) words[plane] = ring.slab(stage_offset, i, s / 2 * kPlanes + plane);
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            uint32_t unit_words[kPlanes], operand[2][Decode::kOperands][4];
#pragma unroll
            for (int plane = 0; plane < kPlanes; ++plane) unit_words[plane] = word_of(words[plane], r);
            Decode::decode(unit_words, operand);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
#pragma unroll
              for (int o = 0; o < Decode::kOperands; ++o)
                multiply(dots[r][o], operand[j][o], b[s + j], (s + j) * 32 % kPart == 0 ? begin : dots[r][o]);
              if ((s + j + 1) * 32 % kPart) continue;
              const int part = (s + j) * 32 / kPart;
              const uint32_t pair = word_of(ring.slab(stage_offset, i, kScaleSlab + part), r);
              uint4 zeros;
              if constexpr (SHIFT == 2) zeros = ring.slab(stage_offset, i, kZeroSlab + 2 * part + r / 2);
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                const float scale = T::to_float(uint16_t(pair >> 16 * h));
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                  auto rows = [&](int o) {
                    const float upper = __int_as_float(dots[r][o][e]);
                    return h ? __int_as_float(dots[r][o][2 + e]) - upper : upper;
                  };
                  float dot = fmaf(rows(0), kUpper * unit[part], offset[part][h][e]);
                  if constexpr (Decode::kOperands == 2) dot = fmaf(rows(1), unit[part], dot);
                  if constexpr (SHIFT > 0) {
                    float shift = p.shift;
                    if constexpr (SHIFT == 2) shift -= __uint_as_float(word_of(zeros, r % 2 * 2 + h));
                    dot += (h ? 16 : 1) / kUnit * shift * sum[part][e];
                  }
                  acc[i][r][2 * h + e] += scale * dot;
                }
              }
            }
          }
        }
      }
      ring.fetch(k_tile + STAGES * kStride, stage_offset);
      commit_copies();  // empty groups keep the count
      stage_offset = next_stage(stage_offset);
    }
    if (chunk_end < at.k_end) splitter.split(next_digits, units_of(next_digits));
    unsigned char* const used = digits;
    digits = next_digits, next_digits = used;
  }

  // Partial sums over the ring and the digits: all copies have landed and all warps are done with them.
  wait_copies<0>();
  __syncthreads();
  float* const partial = reinterpret_cast<float*>(shared) + (at.warp_k * kTokens + owner) * kPitch + at.warp_n * ROW_TILES * 64;
  const float weights[2] = {at.t % 2 ? 65536.0f : 1.0f, at.t % 2 ? 0.0f : 256.0f};  // of this lane's two columns
#pragma unroll
  for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum = acc[i][r][2 * h] * weights[0] + acc[i][r][2 * h + 1] * weights[1];
        sum += __shfl_xor_sync(~0u, sum, 1);
        if (at.t % 2 == 0 && at.t / 2 < at.tokens) partial[i * 64 + r * 16 + h * 8 + at.g] = h ? sum / 16 : sum;
      }
  __syncthreads();
  finish(p, at, shared, kTokens, kUnit, factors);
}
