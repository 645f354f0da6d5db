// What hopper.cu asks of sm_90a: wgmma of TOKENS tokens in FORMAT, barriers in shared memory, bulk copies, clusters.
#pragma once
#include "decode.cuh"

using uint64_t = unsigned long long;
using T = FORMAT;

// One wgmma: the registers of the sums, then of A, then the descriptor of B.
#define TEXT_8 "%0,%1,%2,%3"
#define TEXT_16 TEXT_8 ",%4,%5,%6,%7"
#define TEXT_24 TEXT_16 ",%8,%9,%10,%11"
#define TEXT_32 TEXT_24 ",%12,%13,%14,%15"
#define TEXT_48 TEXT_32 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define TEXT_64 TEXT_48 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define TEXT_96 TEXT_64 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define TEXT_128 TEXT_96 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define TEXT_192                                                                                      \
  TEXT_128 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85" \
  ",%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define TEXT_256                                                                          \
  TEXT_192 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" \
  ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)
#define SUMS_8 FOUR(0)
#define SUMS_16 SUMS_8, FOUR(4)
#define SUMS_24 SUMS_16, FOUR(8)
#define SUMS_32 SUMS_24, FOUR(12)
#define SUMS_48 SUMS_32, FOUR(16), FOUR(20)
#define SUMS_64 SUMS_48, FOUR(24), FOUR(28)
#define SUMS_96 SUMS_64, SIXTEEN(32)
#define SUMS_128 SUMS_96, SIXTEEN(48)
#define SUMS_192 SUMS_128, SIXTEEN(64), SIXTEEN(80)
#define SUMS_256 SUMS_192, SIXTEEN(96), SIXTEEN(112)
#define REST_8 "{%4,%5,%6,%7}, %8"
#define REST_16 "{%8,%9,%10,%11}, %12"
#define REST_24 "{%12,%13,%14,%15}, %16"
#define REST_32 "{%16,%17,%18,%19}, %20"
#define REST_48 "{%24,%25,%26,%27}, %28"
#define REST_64 "{%32,%33,%34,%35}, %36"
#define REST_96 "{%48,%49,%50,%51}, %52"
#define REST_128 "{%64,%65,%66,%67}, %68"
#define REST_192 "{%96,%97,%98,%99}, %100"
#define REST_256 "{%128,%129,%130,%131}, %132"
#define PASTE2(a, b) a##b
#define PASTE(a, b) PASTE2(a, b)
#define QUOTE2(a) #a
#define QUOTE(a) QUOTE2(a)
#define WGMMA(TYPE, ADD)                                                                                            \
  asm volatile(                                                                                                     \
      "{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n"                                                          \
      "wgmma.mma_async.sync.aligned.m64n" QUOTE(TOKENS) "k16.f32." TYPE "." TYPE " {" PASTE(TEXT_, TOKENS) "}, "    \
      PASTE(REST_, TOKENS) ", add, 1, 1, 0;\n}"                                                                     \
      : PASTE(SUMS_, TOKENS)                                                                                        \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// d = a b, or d += a b.
template <bool Add>
__device__ __forceinline__ void wgmma(float (&d)[TOKENS / 2], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (T::kMantissa == 10) {
    if constexpr (Add) WGMMA("f16", "1");
    else WGMMA("f16", "0");
  } else {
    if constexpr (Add) WGMMA("bf16", "1");
    else WGMMA("bf16", "0");
  }
}
__device__ __forceinline__ void fence_wgmma() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_wgmma() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void wait_wgmma() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

__device__ __forceinline__ void init_barrier(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Without a branch: between wgmmas one would make the compiler serialise them.
__device__ __forceinline__ void arrive_if(bool condition, uint32_t barrier) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p mbarrier.arrive.shared::cta.b64 _, [%1];\n}"
               :
               : "r"(int(condition)), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t phase) {
  asm volatile("{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\n}"
               :
               : "r"(barrier), "r"(phase)
               : "memory");
}
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :
               : "r"(to), "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void copy_box(uint32_t to, const void* map, int k, int token, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               :
               : "r"(to), "l"(map), "r"(k), "r"(token), "r"(barrier)
               : "memory");
}

// The same to both blocks of a pair: to that place of their shared memory, for that barrier of theirs.
__device__ __forceinline__ void copy_box_to_both(uint32_t to, const void* map, int k, int token, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;"
      :
      : "r"(to), "l"(map), "r"(k), "r"(token), "r"(barrier), "h"(uint16_t(3))
      : "memory");
}
// Releases to the cluster are fences of the whole GPU, 1400 cycles each; what is announced here are reads that have ended.
__device__ __forceinline__ void arrive_at_block(int block, uint32_t barrier) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [there];\n}"
      :
      : "r"(barrier), "r"(block)
      : "memory");
}

// Sums are not read before the wait above.
template <int N>
__device__ __forceinline__ void landed(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// True in one lane of the warp.
__device__ __forceinline__ bool elect() {
  uint32_t elected;
  asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xFFFFFFFF;\nselp.b32 %0, 1, 0, one;\n}" : "=r"(elected));
  return elected;
}

// Of the cluster's blocks. Nothing that was written before is meant to be seen behind it.
__device__ __forceinline__ void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// To another block's shared memory, whose barrier counts the bytes.
__device__ __forceinline__ void send(int block, uint32_t address, const float (&v)[4], uint32_t barrier) {
  asm volatile(
      "{\n.reg .b32 to, counter;\nmapa.shared::cluster.u32 to, %0, %6;\nmapa.shared::cluster.u32 counter, %5, %6;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [to], {%1, %2, %3, %4}, [counter];\n}"
      :
      : "r"(address), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier), "r"(block)
      : "memory");
}
__device__ __forceinline__ void wait_for_sent(uint32_t barrier) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n@!done bra AGAIN;\n}"
      :
      : "r"(barrier)
      : "memory");
}

// An 8x8 matrix of 16-bit values, a row's pair in each lane, as its columns' pairs.
__device__ __forceinline__ uint32_t transpose(uint32_t v) {
  uint32_t d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(v));
  return d;
}

// Four of them to shared memory, transposed: lane i has the address of column i % 8 of matrix i / 8.
__device__ __forceinline__ void store_transposed(uint32_t address, const uint32_t (&v)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               :
               : "r"(address), "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3])
               : "memory");
}

// B operand of 16 k: rows of 128 bytes (64 k of a token) in the 128-byte swizzle, eight rows in 1024 bytes. `place` is the
// address in units of 16 bytes. In a cluster that holds the block's rank, from bit 20 on: it falls into the leading dimension's
// offset, which means nothing with this swizzle.
__device__ __forceinline__ uint64_t descriptor(uint32_t place) {
  return (uint64_t(1) << 62) | (uint64_t(64) << 32) | (1u << 16) + place;
}
