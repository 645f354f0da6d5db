// y = x W^T + bias for many tokens on sm_90a: linear.cu's sums from linear.cu's weight layout, by wgmma.
//
// Decoded weights are the A operand (64 rows, in registers) of wgmma.m64nTOKENSk16, x its B operand in shared memory.
//
// A block owns ROW_TILES row tiles, TOKENS tokens and its share of k, which it takes in turns of one to sixteen k tiles. Two
// threads ask for turns ahead, into a ring: one for planes, scales and zeros by bulk copies, one for x by TMA (128-byte swizzle,
// zeros beyond M and K). Each consumer warp decodes its WORDS words of one row tile; the 64 rows of a wgmma are 16 of each warp
// of a warpgroup, whichever rows those are. The wgmmas of one piece (a word, 64 k) run while the next piece is decoded, to the
// other of two sets of registers. K_GROUPS groups of warps share the k tiles of a turn.
//
// A weight's base and middle are taken off exactly, in 16 bits. To 32 tokens, sums over a part of k are scaled, in fp32. With more,
// each weight is, with one rounding in 16 bits, and sums run through all of K. With zeros, weights are made in fp32.
//
// The blocks of a cluster split k; each adds up and stores its share of the sums, in one fixed order, from its shared memory.
// Where k is not split, and with one group along k, a block computes several tiles: the ring fills for the next while one is
// stored, from 48 tokens on by whole rows of y, which pass through shared memory. From 4096 tokens on two such blocks are a
// cluster and share x: each asks for half of it, for both.
//
// Where tiles do not fill whole waves of blocks, blocks share the turns of some tiles evenly (stream-K, arXiv 2301.03598): each
// takes a run of them, in the order of tiles. Where it ends within a tile, it leaves the sums in global memory; where it begins
// within one, it adds what blocks before it left, in one fixed order. It does so last, when that has long been there.
//
// Measured on an H200 (2026-11): to 128 tokens decoding bounds it, with the registers that wgmma takes from its instructions,
// and what a call costs whatever its size; from 256 on the tensor cores, and from 2048 on power, to which the clock falls.
// docs/kernels.md has the figures.
//
// Limits: as linear.cu's. Between wgmmas there must be no branch: the compiler then waits for each before the next (C7513).
//
// Compiled by NVRTC with the macros of linear.cu from FORMAT to GROUP_SIZE, and (hopper.py, defines)
//   ROW_TILES  1, 2 or 4;  WORDS  1 or 2: a warp's words of a row tile (4 * ROW_TILES / WORDS warps share the rows)
//   TOKENS     tokens of a block, one of those below
//   K_GROUPS   1, 2 or 4
//   TURN_TILES k tiles of a turn
//   STAGES     turns in the ring
//   BLOCKS     blocks an SM, 1 or 2
//   SPLIT      1: clusters split k
//   PAIR       1: clusters of two blocks, neighbours along rows, share x
//   STREAM_K   1: blocks share the turns of `shared_tiles` tiles
//   GATED      1: as in call.cuh; ROW_TILES is even then, and row tiles are in turn of the first layer and of the second
#include "hopper.cuh"

using Decode = Decoder<T, BITS, bool(ROUND), true>;

constexpr int kPlanes = BITS + ROUND;
constexpr int kSharers = PAIR ? 2 : 1;  // blocks that share x
constexpr int kHalves = GATED ? 2 : 1;  // layers that an output takes a sum of
constexpr int kOutputTiles = ROW_TILES / kHalves;
constexpr int kRowWarps = 4 * ROW_TILES / WORDS;  // consumer warps along rows
static_assert(kRowWarps % 4 == 0);  // whole warpgroups
constexpr int kConsumers = 32 * kRowWarps * K_GROUPS, kThreads = kConsumers + 128;
constexpr int kWeightsWarp = kConsumers / 32;  // the other warps: one of weights, one of x, the clerk
// 256 or 512 consumers; an SM has 65536 registers for its blocks.
constexpr int kConsumerRegisters = kConsumers == 512 ? 112 : BLOCKS == 2 ? 104 : 232;
constexpr int kProducerRegisters = kConsumers * BLOCKS == 512 ? 32 : 40;
constexpr int kTurnTiles = TURN_TILES, kTurn = 64 * kTurnTiles;
static_assert(TOKENS <= 128 || K_GROUPS == 1);
static_assert(PAIR + STREAM_K + SPLIT <= 1);
static_assert(!(PAIR || STREAM_K) || K_GROUPS == 1);
__device__ constexpr int largest_part() {
  for (int k = kTurn; k > 16; k /= 2)
    if (GROUP_SIZE % k == 0) return k;
  return 16;
}
constexpr int kPart = largest_part();  // k that share a scale for certain
constexpr int kParts = kTurn / kPart;
// Sums over a part are scaled; else every weight is.
constexpr bool kScaleSums = SHIFT == 0 && WORDS == 1 && TOKENS <= 32 && kPart >= 64;
constexpr int kGroupTiles = kTurnTiles / K_GROUPS;  // k tiles of a group of warps and turn
constexpr int kSumTiles = kPart / 64 > kGroupTiles ? kGroupTiles : kPart < 64 ? 1 : kPart / 64;  // of these that share a scale
constexpr int kBox = TOKENS * 128;  // bytes of x of 64 k
constexpr int kTileBytes = kPlanes * 512;
constexpr int kPlanesAt = kTurnTiles * kBox, kScalesAt = kPlanesAt + kTurnTiles * ROW_TILES * kTileBytes;
constexpr int kZerosAt = kScalesAt + kParts * ROW_TILES * 128;
constexpr int kStageBytes = (kZerosAt + (SHIFT == 2 ? kParts * ROW_TILES * 256 : 0) + 1023) / 1024 * 1024;
constexpr bool kExchange = K_GROUPS > 1 || SPLIT;  // sums pass through shared memory
// Else, with many tokens, y does, behind the ring: kPass tokens at a time of the 64 * WORDS rows of a warpgroup.
constexpr bool kByRows = !kExchange && (TOKENS >= 48 || GATED);
constexpr int kPass = TOKENS % 64 == 0 ? 64 / WORDS : TOKENS <= 16 ? 16 : 32;
constexpr int kReaders = 128 * kHalves / (GATED ? WORDS : 1);  // threads that share what they pass: with GATED, of both layers
static_assert(!GATED || (ROW_TILES % 2 == 0 && kByRows));
constexpr int kPassAt = STAGES * kStageBytes, kPassBytes = kPass * WORDS * 128;
constexpr int kPieces = kGroupTiles * WORDS;            // of a warp and turn
static_assert(kPieces > 1 || kTurnTiles == 1);          // then turns come in pairs
constexpr int kTurnsAtOnce = kPieces == 1 ? 2 : 1;      // two sets of operands take turns
constexpr int kColumns = TOKENS / 8, kUnits = WORDS * kColumns;  // a unit: a thread's sums of a word and eight tokens
constexpr float kUnit = Decode::kUnit;
constexpr int kBand = 16 / kSharers;  // clusters along rows that are computed at a time, to share x in the L2

struct alignas(64) Params {
  unsigned char x[128];    // tensor map of (M, K), boxes of TOKENS x 64
  const uint4* planes;     // as in linear.cu
  const uint4* scales;
  const uint4* zeros;
  const uint16_t* bias;
  uint16_t* y;
  int M, N, K, row_tiles, k_tiles, stored, groups;  // GATED: of one layer
  int splits;              // blocks of a cluster
  int split_turns;         // turns of one of them, an even number where a turn is one k tile
  int barriers;            // where in shared memory they are: beyond the ring, or the sums that take its place
  float shift;
  // STREAM_K:
  int shared_tiles;        // the first tiles, whose turns the blocks share
  float4* left;            // for each block room for the sums of a tile, then for each a ticket
  uint64_t ticket;         // what is written there when the sums are; by chance it is there once in 2^64 times
  int share, one_more;     // turns of a block (pairs of them where they are multiplied so), and how many blocks have one more
  int waves;               // tiles that a block computes whole before
};

__device__ __forceinline__ void sync_consumers() { asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory"); }
__device__ __forceinline__ void sync_readers(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kReaders) : "memory");
}

// Tiles of a cluster along rows and tokens.
__device__ __forceinline__ int rows_of_clusters(const Params& p) {
  return (p.row_tiles + kOutputTiles * kSharers - 1) / (kOutputTiles * kSharers);
}
__device__ __forceinline__ int token_blocks(const Params& p) { return (p.M + TOKENS - 1) / TOKENS; }
__device__ __forceinline__ int tiles_of(const Params& p) { return rows_of_clusters(p) * token_blocks(p); }

// A block's part of its cluster's tile.
struct Tile {
  int row_block, token_block;
  __device__ Tile(const Params& p, int index) {
    const int columns = token_blocks(p), band = index / (kBand * columns), rows = min(kBand, rows_of_clusters(p) - band * kBand);
    index -= band * kBand * columns;
    row_block = (band * kBand + index % rows) * kSharers + blockIdx.x % kSharers, token_block = index / rows;
  }
};

// STREAM_K: the first of the shared turns that a block computes.
__device__ __forceinline__ int first_shared_turn(const Params& p, int block) {
  return (block * p.share + min(block, p.one_more)) * kTurnsAtOnce;
}

// What a block computes, one piece after the other: turns of its cluster's tile.
struct Work {
  int place, tile, first_turn, turns;

  // A place in the block's order counts tiles; with STREAM_K turns: of whole tiles, of the tile that the block ends within, of the one
  // that it begins within.
  __device__ __forceinline__ Work(const Params& p, int place) : place(place) {
    if constexpr (STREAM_K) {
      int block = blockIdx.x;
      asm volatile("" : "+r"(block));  // what follows from it is not to be kept in registers from piece to piece
      const int all = p.split_turns, begin = first_shared_turn(p, block), end = first_shared_turn(p, block + 1);
      const int first_whole = unsigned(begin + all - 1) / all, last = unsigned(end) / all;  // shared tiles; it ends within the last
      const int wholes = p.waves + max(last - first_whole, 0), i = unsigned(place) / all;
      tile = i < p.waves ? p.shared_tiles + i * int(gridDim.x) + block : first_whole + i - p.waves;
      first_turn = 0, turns = all;
      if (i < wholes) return;
      place -= wholes * all;
      tile = last, first_turn = max(begin - last * all, 0), turns = end - last * all - first_turn;
      if (place < turns) return;
      place -= turns;
      tile = first_whole - 1, first_turn = begin - tile * all, turns = all - first_turn;
      if (first_whole > last || place > 0 || turns == 0) tile = tiles_of(p);  // that was all
    } else {
      const int all = kTurnTiles == 1 ? (p.k_tiles + 1) / 2 * 2 : (p.k_tiles + kTurnTiles - 1) / kTurnTiles;
      tile = place;
      first_turn = SPLIT ? blockIdx.x % p.splits * p.split_turns : 0;
      turns = min(p.split_turns, all - first_turn);
    }
  }
  __device__ __forceinline__ explicit Work(const Params& p)
      : Work(p, STREAM_K ? 0 : SPLIT ? blockIdx.x / p.splits : blockIdx.x / kSharers) {}
  __device__ __forceinline__ bool there(const Params& p) const { return tile < tiles_of(p); }
  __device__ __forceinline__ Work next(const Params& p) const {  // a cluster that splits k has one tile
    return Work(p, STREAM_K ? place + turns : SPLIT ? tiles_of(p) : place + gridDim.x / kSharers);
  }
};

// What a block's producers read of a tile, turn by turn. They have few registers, and one thread each, whose latency bounds
// tiles of few tokens: addresses are stepped.
struct Weights {
  const unsigned char *planes, *scales, *zeros;  // of the first row tile; planes of the next turn
  uint32_t row_bytes, row_groups;                // of a row tile: bytes of planes, groups
  int last;                                      // row tile that there is; what follows has its weights, and is not stored
  int k_tile;                                    // of the next turn

  __device__ Weights(const Params& p, const Tile& tile, int first_turn) : k_tile(first_turn * kTurnTiles) {
    const int row_tile = min(tile.row_block * kOutputTiles, p.row_tiles - 1);
    planes = reinterpret_cast<const unsigned char*>(p.planes) + (size_t(row_tile) * p.k_tiles + k_tile) * p.stored * 512;
    scales = reinterpret_cast<const unsigned char*>(p.scales) + size_t(row_tile) * p.groups * 128;
    if (SHIFT == 2) zeros = reinterpret_cast<const unsigned char*>(p.zeros) + size_t(row_tile) * p.groups * 256;
    row_bytes = uint32_t(p.k_tiles * p.stored) * 512, row_groups = p.groups;
    last = min(kOutputTiles, p.row_tiles - row_tile) - 1;
    asm volatile("" : "+l"(planes), "+l"(scales), "+r"(row_bytes));  // not to be computed anew each turn
  }
  // The row tile that is i-th in the block, from the first.
  __device__ __forceinline__ int row_tile(const Params& p, int i) const {
    return min(i / kHalves, last) + i % kHalves * p.row_tiles;
  }
  __device__ __forceinline__ void fetch(const Params& p, uint32_t to, uint32_t barrier) {
    const int there = max(min(p.k_tiles - k_tile, kTurnTiles), 0);
    expect(barrier, there * ROW_TILES * kTileBytes + kParts * ROW_TILES * (SHIFT == 2 ? 384 : 128));
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) {
      const unsigned char* const from = planes + row_tile(p, i) * row_bytes;
      const uint32_t place = to + kPlanesAt + i * kTurnTiles * kTileBytes;
      if (p.stored == kPlanes) {
        if (there > 0) copy_bulk(place, from, there * kTileBytes, barrier);
      } else {
#pragma unroll 1
        for (int k = 0; k < there; ++k) copy_bulk(place + k * kTileBytes, from + k * p.stored * 512, kTileBytes, barrier);
      }
    }
    planes += kTurnTiles * p.stored * 512;
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) {
      const int group = GROUP_SIZE ? min((k_tile * 64 + part * kPart) / max(GROUP_SIZE, 1), p.groups - 1) : 0;
#pragma unroll
      for (int i = 0; i < ROW_TILES; ++i) {
        const uint32_t of_row = row_tile(p, i) * row_groups + group;
        copy_bulk(to + kScalesAt + (part * ROW_TILES + i) * 128, scales + of_row * 128, 128, barrier);
        if constexpr (SHIFT == 2) copy_bulk(to + kZerosAt + (part * ROW_TILES + i) * 256, zeros + size_t(of_row) * 256, 256, barrier);
      }
    }
    k_tile += kTurnTiles;
  }
};
__device__ __forceinline__ void fetch_x(const Params& p, int k, int token, uint32_t to, uint32_t barrier) {
#pragma unroll
  for (int i = 0; i < kTurnTiles; ++i) {
    if constexpr (PAIR) {
      const int half = blockIdx.x % 2;
      copy_box_to_both(to + i * kBox + half * (kBox / 2), p.x, k + i * 64, token + half * (TOKENS / 2), barrier);
    } else {
      copy_box(to + i * kBox, p.x, k + i * 64, token, barrier);
    }
  }
}

// A place in the ring.
struct Stage {
  int index = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void step() {
    if (++index == STAGES) index = 0, phase ^= 1;
  }
};

// STREAM_K: a consumer's sums go to global memory, and from there to the sums of the same thread of another block. A warp of its
// own, the clerk, says when they are there (`keep_books`), so that consumers do not wait for memory.
using Sums = float[WORDS][TOKENS / 2];
constexpr int kWithClerk = kConsumers + 32;
__device__ __forceinline__ float4* room_of(const Params& p, int block) {
  return p.left + size_t(block) * (kUnits * kConsumers) + threadIdx.x;
}
__device__ __forceinline__ void leave(const Params& p, const Sums& acc) {
  float4* const to = room_of(p, blockIdx.x);
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    const float* const v = acc[unit / kColumns] + unit % kColumns * 4;
    to[unit * kConsumers] = make_float4(v[0], v[1], v[2], v[3]);
  }
  asm volatile("bar.arrive 6, %0;" ::"n"(kWithClerk) : "memory");
}
// Adds what other blocks left of a tile that begins with turn `begin`.
__device__ __forceinline__ void collect(const Params& p, int begin, Sums& acc) {
  asm volatile("bar.sync 7, %0;" ::"n"(kWithClerk) : "memory");
  for (int block = blockIdx.x; first_shared_turn(p, block) > begin; --block) {
    const float4* const from = room_of(p, block - 1);
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      const float4 v = __ldcg(from + unit * kConsumers);
      float* const sum = acc[unit / kColumns] + unit % kColumns * 4;
      sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
    }
  }
}
__device__ __forceinline__ void keep_books(const Params& p) {
  const int all = p.split_turns, begin = first_shared_turn(p, blockIdx.x), end = first_shared_turn(p, blockIdx.x + 1);
  const int begun = unsigned(begin) / all * all;  // the first turn of the tile that the block begins within
  uint64_t* const tickets = reinterpret_cast<uint64_t*>(p.left + size_t(gridDim.x) * (kUnits * kConsumers));
  const bool one = elect();
  asm volatile("griddepcontrol.wait;" ::: "memory");  // the kernel before may use the same memory
  if (unsigned(end) % all > 0) {
    asm volatile("bar.sync 6, %0;" ::"n"(kWithClerk) : "memory");
    if (one) asm volatile("st.release.gpu.b64 [%0], %1;" ::"l"(tickets + blockIdx.x), "l"(p.ticket) : "memory");
  }
  if (begun == begin || end < begun + all) return;
  for (int block = blockIdx.x; one && first_shared_turn(p, block) > begun; --block) {
    uint64_t ticket;
    do asm volatile("ld.acquire.gpu.b64 %0, [%1];" : "=l"(ticket) : "l"(tickets + block - 1) : "memory");
    while (ticket != p.ticket);
    tickets[block - 1] = 0;  // a graph's next launch finds the same memory
  }
  __syncwarp();
  asm volatile("bar.arrive 7, %0;" ::"n"(kWithClerk) : "memory");
}

extern "C" __global__ void __launch_bounds__(kThreads, BLOCKS) matgptq_linear(const __grid_constant__ Params p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t ring = uint32_t(__cvta_generic_to_shared(shared));
  // The compiler does not see that a warp's index is the same in all lanes; descriptors are to be in uniform registers.
  const int lane = threadIdx.x % 32, warp = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 32, 0);
  const int split = SPLIT ? blockIdx.x % p.splits : 0;
  const uint32_t full = ring + p.barriers, empty = full + 8 * STAGES;
  const uint32_t sent = empty + 8 * STAGES;  // SPLIT: all sums have come. PAIR, of each stage: empty in the other block too
  if (warp == kWeightsWarp && elect()) {
#pragma unroll 1
    for (int i = 0; i < STAGES; ++i) init_barrier(full + 8 * i, 2), init_barrier(empty + 8 * i, kConsumers);
#pragma unroll 1
    for (int i = 0; i < (PAIR ? STAGES : 1); ++i) init_barrier(sent + 8 * i, 1);
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    if (SPLIT) expect(sent, (kUnits - split + p.splits - 1) / p.splits * p.splits * 32 * kRowWarps * 16);
    // Weights do not depend on the previous kernel: start them first. Only a few, as x queues behind all that is asked for before it.
    const Work work(p);
    Weights weights(p, Tile(p, work.tile), work.first_turn);
#pragma unroll 1
    for (int turn = 0; turn < min(work.turns, BLOCKS); ++turn) weights.fetch(p, ring + turn * kStageBytes, full + 8 * turn);
  }
  if (PAIR) arrive_at_cluster(), wait_for_cluster();
  else __syncthreads();

  if (warp >= kWeightsWarp) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
    Stage at;
    if (warp == kWeightsWarp && elect()) {
      asm volatile("griddepcontrol.wait;" ::: "memory");
      int asked = BLOCKS;  // turns of the first piece of work whose weights are on their way
#pragma unroll 1
      for (Work work(p); work.there(p); work = work.next(p)) {
        asked = min(asked, work.turns);
        Weights weights(p, Tile(p, work.tile), work.first_turn + asked);
#pragma unroll 1
        for (int turn = 0; turn < asked; ++turn) at.step();
#pragma unroll 1
        for (int turn = asked; turn < work.turns; ++turn, at.step()) {
          wait(empty + 8 * at.index, at.phase ^ 1);  // at first, of no turn
          weights.fetch(p, ring + at.index * kStageBytes, full + 8 * at.index);
        }
        asked = 0;
      }
    }
    if (warp == kWeightsWarp + 1 && elect()) {
      asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#pragma unroll 1
      for (Work work(p); work.there(p); work = work.next(p)) {
        const int token = Tile(p, work.tile).token_block * TOKENS;
        int k = work.first_turn * kTurn;
#pragma unroll 1
        for (int turn = 0; turn < work.turns; ++turn, at.step(), k += kTurn) {
          const uint32_t barrier = full + 8 * at.index;
          wait(empty + 8 * at.index, at.phase ^ 1);
          if (PAIR) arrive_at_block(blockIdx.x % 2 ^ 1, sent + 8 * at.index);
          expect(barrier, kTurnTiles * kBox);
          if (PAIR) wait(sent + 8 * at.index, at.phase);
          fetch_x(p, k, token, ring + at.index * kStageBytes, barrier);
        }
      }
    }
    if (STREAM_K && warp == kWeightsWarp + 2) keep_books(p);
    __syncwarp();
    if (SPLIT || PAIR) arrive_at_cluster(), wait_for_cluster();
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kConsumerRegisters));
  const int g = lane / 4, t = lane % 4, k_group = warp / kRowWarps, thread = threadIdx.x % (32 * kRowWarps);
  // A warp stores the rows of its own words of a tile. Where sums pass through shared memory, each octet of its lanes decodes the
  // words of another of the tile's warps, so that lanes that read at once hit all banks; `home` is the thread that decodes ours.
  constexpr int kTileWarps = 4 / WORDS;
  const int row_warp = warp % kRowWarps, tile_of_warp = row_warp / kTileWarps;
  const int own_word = row_warp % kTileWarps * WORDS;
  const int first_word = kExchange ? (row_warp + lane / 8) % kTileWarps * WORDS : own_word;
  const int home_warp = tile_of_warp * kTileWarps + (row_warp + kTileWarps - lane / 8 % kTileWarps) % kTileWarps;
  const int home = kExchange ? home_warp * 32 + lane : thread;
  constexpr int kLag = kPieces == 1 ? 2 : 1;  // turns that may still be multiplied when one is decoded
  int stage = 0;
  uint32_t phase = 0;
  auto release = [&](int turns_ago, bool there) {
    const int of_stage = stage - turns_ago;
    arrive_if(there, empty + 8 * (of_stage < 0 ? of_stage + STAGES : of_stage));
  };
#pragma unroll 1
  for (Work work(p); work.there(p); work = work.next(p)) {
    const int turns = work.turns;
    float acc[WORDS][TOKENS / 2] = {};
    uint32_t operand[2][4][4], words[kPlanes][WORDS];
    // kScaleSums: sums of a part, and the scales of its two rows.
    float dot[WORDS][TOKENS / 2] = {}, scale_of[WORDS][2] = {};
    auto add_scaled = [&](int r) {
      landed(dot[r]);
#pragma unroll
      for (int e = 0; e < TOKENS / 2; ++e) acc[r][e] += scale_of[r][e / 2 % 2] * dot[r][e];
    };
#pragma unroll 1
    for (int turn = 0; turn < turns; turn += kTurnsAtOnce) {
      // All waits come first: the compiler serialises wgmmas that have a loop between them.
      wait(full + 8 * stage, phase);
      if constexpr (kTurnsAtOnce == 2) wait(full + 8 * ((stage + 1) % STAGES), stage + 1 == STAGES ? phase ^ 1 : phase);
#pragma unroll
      for (int piece = 0; piece < kTurnsAtOnce * kPieces; ++piece) {
        const int r = piece % WORDS, k_tile = k_group * kGroupTiles + piece % kPieces / WORDS;
        const unsigned char* const weights = shared + stage * kStageBytes;
        if (r == 0) {
#pragma unroll
          for (int plane = 0; plane < kPlanes; ++plane) {
            const unsigned char* const from =
                weights + kPlanesAt + (tile_of_warp * kTurnTiles + k_tile) * kTileBytes + plane * 512 + lane * 16 + first_word * 4;
            if constexpr (WORDS == 1) words[plane][0] = *reinterpret_cast<const uint32_t*>(from);
            else *reinterpret_cast<uint2*>(words[plane]) = *reinterpret_cast<const uint2*>(from);
          }
        }
        uint32_t(&a)[4][4] = operand[piece % 2];
        wait_wgmma<1>();  // the piece before the last has been multiplied: its registers are free
        if (kPieces == 1 || piece == 1) release(kLag, turn + piece / kPieces >= kLag);
        uint32_t unit[kPlanes];
#pragma unroll
        for (int plane = 0; plane < kPlanes; ++plane) unit[plane] = words[plane][r];
        Decode::decode(unit, a);
        if constexpr (kScaleSums) {
#pragma unroll
          for (int step = 0; step < 4; ++step) Decode::centre(a[step], step);
        } else {
          constexpr int kSteps = kPart < 64 ? kPart / 16 : 4;  // that share a scale
#pragma unroll
          for (int s = 0; s < 4; s += kSteps) {
            const int slot = ((k_tile * 64 + s * 16) / kPart * ROW_TILES + tile_of_warp) * 64 + g * 8 + (first_word + r) * 2;
            const uint32_t pair = *reinterpret_cast<const uint32_t*>(weights + kScalesAt + slot * 2);
            Scale scale = Decode::scale<SHIFT>(pair);
            if constexpr (SHIFT == 2) {
              const float2 zeros = *reinterpret_cast<const float2*>(weights + kZerosAt + slot * 4);
              scale.zero[0] = zeros.x, scale.zero[1] = zeros.y;
            }
#pragma unroll
            for (int step = s; step < s + kSteps; ++step) Decode::weights<SHIFT>(a[step], step, scale, p.shift);
          }
        }
        const uint32_t box = ring / 16 + stage * (kStageBytes / 16) + k_tile * (kBox / 16);
        if constexpr (kScaleSums) {
          const bool fresh = piece / WORDS % kSumTiles == 0;
          if (fresh) {
            wait_wgmma<0>();
            add_scaled(r);
            const int slot = (k_tile * 64 / kPart * ROW_TILES + tile_of_warp) * 64 + g * 8 + (first_word + r) * 2;
            const uint32_t pair = *reinterpret_cast<const uint32_t*>(weights + kScalesAt + slot * 2);
            scale_of[r][0] = T::to_float(uint16_t(pair)) * kUnit, scale_of[r][1] = T::to_float(uint16_t(pair >> 16)) * kUnit;
          }
          fence_wgmma();
          if (fresh) wgmma<false>(dot[r], a[0], descriptor(box));
          else wgmma<true>(dot[r], a[0], descriptor(box));
#pragma unroll
          for (int s = 1; s < 4; ++s) wgmma<true>(dot[r], a[s], descriptor(box + s * 2));
        } else {
          fence_wgmma();
#pragma unroll
          for (int s = 0; s < 4; ++s) wgmma<true>(acc[r], a[s], descriptor(box + s * 2));
        }
        commit_wgmma();
        if (piece % kPieces == kPieces - 1 && ++stage == STAGES) stage = 0, phase ^= 1;
      }
    }
    wait_wgmma<0>();
#pragma unroll
    for (int r = 0; r < WORDS; ++r) {
      if constexpr (kScaleSums) add_scaled(r);
      else landed(acc[r]);
    }
#pragma unroll
    for (int i = kLag; i > 0; --i) release(i, turns >= i);
    if (SPLIT) arrive_at_cluster();  // done with the ring
    if (STREAM_K) work = Work(p, work.place);  // not kept in registers through the loop above
    const Tile tile(p, work.tile);
    if constexpr (STREAM_K) {
      if (work.first_turn + work.turns < p.split_turns) {
        leave(p, acc);
        continue;
      }
      if (work.first_turn > 0) collect(p, work.tile * p.split_turns, acc);
    }

    const int first_row = (tile.row_block * kOutputTiles + tile_of_warp / kHalves) * 64 + own_word * 16;
    float bias[WORDS][2] = {};
#pragma unroll
    for (int i = 0; i < 2 * WORDS; ++i) {
      const int n = first_row + i * 8 + g;
      if (p.bias && n < p.N) bias[i / 2][i % 2] = T::to_float(p.bias[tile_of_warp % kHalves * p.N + n]);
    }
    if constexpr (kByRows) {
      // [row tile][token][64 rows] in shared memory, the 16-byte chunks of a token in an order of its own: lanes hit all banks.
      const int group = row_warp / 4;
      int thread = threadIdx.x % kReaders;
      asm volatile("" : "+r"(thread));  // what follows from it is not to be kept in registers through the loop above
      // A lane has the address of a token's 8 rows in one of four matrices: rows g and 8 + g of 8 tokens, and of the next 8.
      const int lane_octet = thread % 32 / 16 * 8, lane_half = thread / 8 % 2;
      const int readers = group * 128 / kReaders;
      const unsigned char* const passing = shared + kPassAt + readers * (kReaders / 128) * kPassBytes;
      auto place = [&](int row_tile, int token, int chunk) {
        return ((row_tile * kPass + token) * 8 + (chunk ^ (token % 8))) * 16;
      };
      const int chunk = thread % 8, token = thread / 8;  // that the thread reads
      const int n = (tile.row_block * kOutputTiles + group * WORDS / kHalves) * 64 + chunk * 8;
      const int m = tile.token_block * TOKENS + token;
#pragma unroll
      for (int first = 0; first < TOKENS; first += kPass) {
#pragma unroll
        for (int r = 0; r < WORDS; ++r) {
#pragma unroll
          for (int i = 0; i < kPass; i += 16) {
            uint32_t v[4] = {};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              if (first + i + e / 2 * 8 >= TOKENS) continue;
              const float* const sum = acc[r] + (first + i) / 2 + e * 2;
              v[e] = T::from_floats(sum[0] + bias[r][e % 2], sum[1] + bias[r][e % 2]);
            }
            const int to = place(tile_of_warp % WORDS, i + lane_octet + thread % 8, (own_word + r) * 2 + lane_half);
            store_transposed(ring + kPassAt + group * kPassBytes + to, v);
          }
        }
        sync_readers(2 + readers);
#pragma unroll
        for (int i = 0; i < (GATED ? 1 : WORDS); ++i) {
#pragma unroll
          for (int k = 0; k < kPass; k += kReaders / 8) {
            if (first + k + kReaders / 8 > TOKENS && first + k + token >= TOKENS) continue;
            uint4 v = *reinterpret_cast<const uint4*>(passing + place(i, token + k, chunk));
            if constexpr (GATED) {
              const uint4 up = *reinterpret_cast<const uint4*>(passing + kPass * 128 + place(0, token + k, chunk));
              v = make_uint4(gated<T>(v.x, up.x), gated<T>(v.y, up.y), gated<T>(v.z, up.z), gated<T>(v.w, up.w));
            }
            const int rows = p.N - (n + i * 64);  // from here to the end
            if (m + first + k >= p.M || rows <= 0) continue;
            uint16_t* const to = p.y + size_t(m + first + k) * p.N + n + i * 64;
            if (GATED || p.N % 8 == 0) {
              *reinterpret_cast<uint4*>(to) = v;
            } else {
              const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
              for (int e = 0; e < 8; ++e)
                if (e < rows) to[e] = uint16_t(pairs[e / 2] >> (e % 2 * 16));
            }
          }
        }
        sync_readers(2 + readers);
      }
      continue;
    }

    // Stores a unit's sums of 8 tokens and 16 rows, transposed so that a lane has neighbouring rows.
    const int first_token = tile.token_block * TOKENS + g;
    uint16_t* const y = p.y + size_t(first_token) * p.N + first_row + 2 * t;
    auto store = [&](int unit, const float (&sum)[4]) {
      const int r = unit / kColumns, column = unit % kColumns;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float b = r == 0 ? bias[0][h] : bias[WORDS - 1][h];
        const uint32_t pair = transpose(T::from_floats(sum[2 * h] + b, sum[2 * h + 1] + b));
        const int rows = p.N - (first_row + r * 16 + h * 8 + 2 * t);  // from here to the end
        uint16_t* const to = y + size_t(column * 8) * p.N + r * 16 + h * 8;
        if (first_token + column * 8 >= p.M || rows <= 0) continue;
        if (p.N % 2 == 0) {
          *reinterpret_cast<uint32_t*>(to) = pair;
        } else {
          to[0] = uint16_t(pair);
          if (rows > 1) to[1] = uint16_t(pair >> 16);
        }
      }
    };
    auto unit_sums = [&](int unit, float (&v)[4]) {
#pragma unroll
      for (int e = 0; e < 4; ++e) v[e] = acc[unit / kColumns][unit % kColumns * 4 + e];
    };
    // Sums in shared memory, over the ring: [unit][of how many][thread]. First those of the groups of warps along k, ...
    constexpr int kRowThreads = 32 * kRowWarps;
    float4* const sums = reinterpret_cast<float4*>(shared);
    auto add_up = [&](const float4* from, int count, float (&sum)[4]) {
      for (int i = 0; i < count; ++i) {
        const float4 v = from[i * kRowThreads];
        sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
      }
    };
    // ... behind them those of the cluster's blocks. Block u % splits adds up unit u.
    constexpr int kInbox = K_GROUPS > 1 ? K_GROUPS * kUnits * kRowThreads : 0;
    int owner = 0, first_of_slot = 0;  // of the unit that is sent next: unit % splits, unit - owner
    auto skip_units = [&](int count) {
      for (owner += count; owner >= p.splits; owner -= p.splits) first_of_slot += p.splits;
    };
    auto send_unit = [&](const float (&v)[4]) {
      send(owner, ring + (kInbox + (first_of_slot + split) * kRowThreads + thread) * 16, v, sent);
      skip_units(K_GROUPS);
    };
    if constexpr (K_GROUPS > 1) {
      sync_consumers();
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
        float v[4];
        unit_sums(unit, v);
        sums[(unit * K_GROUPS + k_group) * kRowThreads + thread] = make_float4(v[0], v[1], v[2], v[3]);
      }
      sync_consumers();
      if (SPLIT) wait_for_cluster(), skip_units(k_group);  // all blocks are done with their rings
      for (int unit = k_group; unit < kUnits; unit += K_GROUPS) {
        float sum[4] = {};
        add_up(sums + unit * K_GROUPS * kRowThreads + home, K_GROUPS, sum);
        if (SPLIT) send_unit(sum);
        else store(unit, sum);
      }
    } else {
      if (SPLIT) wait_for_cluster();
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
        float v[4];
        unit_sums(unit, v);
        if (SPLIT) send_unit(v);
        else store(unit, v);
      }
    }
    if constexpr (SPLIT) {
      wait_for_sent(sent);
      for (int unit = k_group * p.splits + split; unit < kUnits; unit += K_GROUPS * p.splits) {
        float sum[4] = {};
        add_up(sums + kInbox + (unit - split) * kRowThreads + (K_GROUPS > 1 ? thread : home), p.splits, sum);
        store(unit, sum);
      }
    }
  }
  if (PAIR) arrive_at_cluster(), wait_for_cluster();  // the other block may still write here
}
