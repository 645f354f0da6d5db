// Bit planes -> tensor-core operands.
//
// A lane's share of a unit (16 rows x 64 k, four MMA steps of 16 k) is one 32-bit word per plane: two words A[0], A[1] of
// 2-bit fields (the two most significant bits of every code) and one word for each further bit. With the step
// s = 2j + l, the A-operand register c = 2u + h (h: row g or g + 8, u: k pair) and the half v of that register,
// the weight's nibble position is p = c + 4v, and
//
//     A[j]     holds it in the field at bit  4p + 2 - 2l      (two bits wide)
//     plane i  holds it at bit               4p + 3 - 2l - j
//
// so that planes merge into nibbles, and nibbles into bytes, by select-and-shift on whole words (8 to 32 fields at a
// time), and the four pairs of a nibble word are the four registers of one MMA step.
//
// A pair of fields becomes a pair of floats with one LOP3: OR-ing the field into the mantissa of 2^(mantissa bits - t), t its
// lowest bit, gives 2^(mantissa bits - t) + field exactly. That base, and the middle of the code range, are not taken off
// every weight: they are the same for all rows, so one more MMA a step, of their negatives (`Decoder::bases`), starts the
// sums of all row tiles. Summed so, an operand stands for the small integer
//
//     bits <= 4:  S - 2^(bits-1)              (the kernel multiplies the sum by 2^(8-bits) once, at the end)
//     bits >= 5:  (S << (8-bits)) - 128
//
// Fields are shifted towards the top of the mantissa where that is cheap: a base much above the codes costs precision of
// the fp32 sums. (`Bytes` makes operands of integer MMAs, which need no base.)
#pragma once

using uint32_t = unsigned int;
using uint16_t = unsigned short;

// Number format of activations, scales and output. kOne is a packed pair of ones.
struct Half {
  static constexpr int kMantissa = 10, kBias = 15;
  static constexpr uint32_t kOne = 0x3C003C00u;
  static __device__ float to_float(uint16_t v) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
    return f;
  }
  static __device__ uint16_t from_float(float f) {
    uint16_t v;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f));
    return v;
  }
  static __device__ uint32_t from_floats(float low, float high) {
    uint32_t v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
  }
  static __device__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
  static __device__ uint32_t add2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
  }
  static __device__ uint32_t mul2(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
  }
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct BFloat {
  static constexpr int kMantissa = 7, kBias = 127;
  static constexpr uint32_t kOne = 0x3F803F80u, kNone = 0x80008000u;  // -0: what an FMA may add to a product
  static __device__ float to_float(uint16_t v) { return __uint_as_float(uint32_t(v) << 16); }
  static __device__ uint16_t from_float(float f) {
    uint16_t v;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(f));
    return v;
  }
  static __device__ uint32_t from_floats(float low, float high) {
    uint32_t v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
  }
  static __device__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
  static __device__ uint32_t add2(uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 900
    uint32_t d;
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
#else
    return fma2(a, kOne, b);
#endif
  }
  static __device__ uint32_t mul2(uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 900
    uint32_t d;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
#else
    return fma2(a, b, kNone);
#endif
  }
  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

// Pairs of silu(gate) * up, silu(v) = v / (1 + exp(-v)); both results are rounded, as the two ops' would be.
template <typename T>
__device__ __forceinline__ uint32_t gated(uint32_t gate, uint32_t up) {
  auto silu = [](float v) { return __fdividef(v, 1 + __expf(-v)); };  // 2 ulp; 0 where the divisor is above 2^126
  const uint32_t gated = T::from_floats(silu(T::to_float(uint16_t(gate))), silu(T::to_float(uint16_t(gate >> 16))));
  return T::mul2(gated, up);
}

// A pair of the integer `value` (0 < value <= 2^(mantissa bits + 1)) in number format T.
template <typename T>
__host__ __device__ constexpr uint32_t packed_integer(int value, bool negative = false) {
  int exponent = 0;
  while ((value >> exponent) > 1) ++exponent;
  const int mantissa = exponent <= T::kMantissa ? value << (T::kMantissa - exponent) : value >> 1;
  const uint32_t half = (uint32_t(negative) << 15) | (uint32_t(exponent + T::kBias) << T::kMantissa) |
                        (uint32_t(mantissa) & ((1u << T::kMantissa) - 1));
  return half | (half << 16);
}

// (a & mask) | (b & ~mask) as the one instruction it is: left to itself the compiler takes two.
__device__ __forceinline__ uint32_t select(uint32_t mask, uint32_t a, uint32_t b) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(d) : "r"(mask), "r"(a), "r"(b));
  return d;
}

// Field of Bits bits at bit Pos of each half, shifted right by Shift (left if negative), as kBase + field.
template <typename T, int Bits, int Pos, int Shift>
struct Field {
  static constexpr int kBit = Pos - Shift;
  static_assert(kBit >= 0 && kBit + Bits <= T::kMantissa);
  static constexpr int kBase = 1 << (T::kMantissa - kBit);
  static __device__ __forceinline__ uint32_t get(uint32_t word) {
    constexpr uint32_t kMask = 0x00010001u * (((1u << Bits) - 1) << kBit);
    constexpr uint32_t kMagic = packed_integer<T>(kBase);
    const uint32_t shifted = Shift < 0 ? word << (Shift < 0 ? -Shift : 0) : word >> (Shift < 0 ? 0 : Shift);
    uint32_t pair;  // (shifted & mask) | magic
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(pair) : "r"(shifted), "r"(kMask), "r"(kMagic));
    return pair;
  }
};

// The four fields of a word that are the registers of one MMA step.
template <typename A, typename B, typename C, typename D>
struct Fields {
  static __device__ __forceinline__ void get(uint32_t word, uint32_t (&a)[4]) {
    a[0] = A::get(word), a[1] = B::get(word), a[2] = C::get(word), a[3] = D::get(word);
  }
  template <typename T, int Middle>
  static __device__ __forceinline__ void bases(uint32_t (&a)[4]) {
    a[0] = packed_integer<T>(A::kBase + Middle, true), a[1] = packed_integer<T>(B::kBase + Middle, true);
    a[2] = packed_integer<T>(C::kBase + Middle, true), a[3] = packed_integer<T>(D::kBase + Middle, true);
  }
};

// Low: bases are taken off in 16 bits, so that their size does not matter and the lowest fields may stay where they are.
template <typename T, bool Low, bool Fp16 = T::kMantissa == 10>
struct Layout;
template <typename T, bool Low>
struct Layout<T, Low, true> {
  static constexpr int kLift = Low ? 0 : -4;
  using Even = Fields<Field<T, 2, 0, kLift>, Field<T, 2, 4, 0>, Field<T, 2, 8, 0>, Field<T, 2, 12, 6>>;  // pairs, l = 1
  using Odd = Fields<Field<T, 2, 2, kLift>, Field<T, 2, 6, 0>, Field<T, 2, 10, 6>, Field<T, 2, 14, 6>>;  // pairs, l = 0
  template <int Bits>  // the top Bits bits of nibbles
  using Nibbles = Fields<Field<T, Bits, 4 - Bits, kLift / 2>, Field<T, Bits, 8 - Bits, kLift / 2>, Field<T, Bits, 12 - Bits, 6>,
                         Field<T, Bits, 16 - Bits, 6>>;
};
template <typename T, bool Low>
struct Layout<T, Low, false> {
  using Even = Fields<Field<T, 2, 0, 0>, Field<T, 2, 4, 0>, Field<T, 2, 8, 6>, Field<T, 2, 12, 12>>;
  using Odd = Fields<Field<T, 2, 2, 0>, Field<T, 2, 6, 6>, Field<T, 2, 10, 6>, Field<T, 2, 14, 12>>;
  template <int Bits>
  using Nibbles = Fields<Field<T, Bits, 4 - Bits, 0>, Field<T, Bits, 8 - Bits, 4>, Field<T, Bits, 12 - Bits, 8>, Field<T, Bits, 16 - Bits, 12>>;
};

// Rounds the top bits half up, by the bit below them, saturating: adds `next` to the codes that are not all ones.
// A[0]'s field m belongs with bit 2m + 1 of a plane, A[1]'s with bit 2m.
template <int Singles>
__device__ __forceinline__ void round_planes(uint32_t (&top)[2], uint32_t (&plane)[6], uint32_t next) {
  uint32_t saturated = select(0xAAAAAAAAu, top[0] & (top[0] << 1), top[1] & (top[1] >> 1));
#pragma unroll
  for (int i = 0; i < Singles; ++i) saturated &= plane[i];
  uint32_t carry = next & ~saturated;
#pragma unroll
  for (int i = Singles - 1; i >= 0; --i) {
    const uint32_t out = plane[i] & carry;
    plane[i] ^= carry;
    carry = out;
  }
  top[0] += (carry >> 1) & 0x55555555u;
  top[1] += carry & 0x55555555u;
}

// Two planes -> the 2-bit fields that go with A[j]'s; without the second, its bits are anything.
template <bool Both>
__device__ __forceinline__ uint32_t merge_planes(int j, uint32_t high, uint32_t low) {
  if constexpr (!Both) return j == 0 ? high : high << 1;
  return j == 0 ? select(0xAAAAAAAAu, high, low >> 1) : select(0xAAAAAAAAu, high << 1, low);
}

// Two words of 2-bit fields -> the nibbles of step (j, l); without the second, its bits are anything.
template <bool Both = true>
__device__ __forceinline__ uint32_t merge_pairs(int l, uint32_t high, uint32_t low) {
  if constexpr (!Both) return l == 0 ? high : high << 2;
  return l == 0 ? select(0xCCCCCCCCu, high, low >> 2) : select(0xCCCCCCCCu, high << 2, low);
}

// Bytes 0 and 2 (Parity 0) or 1 and 3 (Parity 1) of a word of codes, as a pair of fp16: 1024 + code.
template <int Parity>
__device__ __forceinline__ uint32_t byte_pair(uint32_t word) {
  return __byte_perm(word, 0x64646464u, Parity ? 0x4341 : 0x4240);
}

// One unit's words, A[0], A[1], then the further planes, with Round the last of them the bit below the served width: the nibbles
// of step s = 2j + l, the upper four bits of every code and the lower four. What a code lacks is anything in `high`, 0 in `low`.
template <int Bits, bool Round>
struct Nibbles {
  uint32_t top[2], plane[6] = {};

  __device__ __forceinline__ explicit Nibbles(const uint32_t (&words)[Bits + Round]) : top{words[0], words[1]} {
#pragma unroll
    for (int i = 0; i < Bits - 2; ++i) plane[i] = words[2 + i];
    if constexpr (Round) round_planes<Bits - 2>(top, plane, words[Bits]);
  }
  __device__ __forceinline__ uint32_t high(int s) const {
    return merge_pairs(s % 2, top[s / 2], merge_planes<(Bits > 3)>(s / 2, plane[0], plane[1]));
  }
  __device__ __forceinline__ uint32_t low(int s) const {
    const uint32_t upper = merge_planes<(Bits > 5)>(s / 2, plane[2], plane[3]);
    const uint32_t nibbles = merge_pairs<(Bits > 6)>(s % 2, upper, merge_planes<(Bits > 7)>(s / 2, plane[4], plane[5]));
    return Bits < 8 ? nibbles & (0x11111111u * (0xFu & ~((1u << (8 - Bits)) - 1))) : nibbles;
  }
};

// Of a word's two rows: scales, each twice, and zeros.
struct Scale {
  uint32_t pair[2];
  float zero[2];
};

template <typename T, int Bits, bool Round, bool Low = false>
struct Decoder {
  using Places = Layout<T, Low>;
  static constexpr float kUnit = Bits < 5 ? float(1 << (8 - Bits)) : 1.0f;  // a unit of the decoded integers, in levels
  static constexpr bool kFp16 = T::kMantissa == 10;
  static constexpr bool kCentred = Bits > 4 && !kFp16;  // operands without a base

  // One unit's words -> the A operands of its four MMA steps.
  static __device__ __forceinline__ void decode(const uint32_t (&words)[Bits + Round], uint32_t (*operand)[4]) {
    const Nibbles<Bits, Round> unit(words);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      uint32_t(&a)[4] = operand[s];
      if constexpr (Bits == 2) {
        if (s % 2 == 0) Places::Odd::get(unit.top[s / 2], a);
        else Places::Even::get(unit.top[s / 2], a);
        continue;
      }
      const uint32_t high = unit.high(s);
      if constexpr (Bits <= 4) {
        Places::template Nibbles<Bits>::get(high, a);
        continue;
      }
      const uint32_t low = unit.low(s);
      if constexpr (kFp16) {
        const uint32_t odd = select(0xF0F0F0F0u, high, low >> 4), even = select(0xF0F0F0F0u, high << 4, low);
        a[0] = byte_pair<0>(even), a[1] = byte_pair<0>(odd), a[2] = byte_pair<1>(even), a[3] = byte_pair<1>(odd);
      } else {
        // bf16 has too few mantissa bits for a byte: (high - 16) * 16 + (128 + low) = code - 128, each step exact.
        uint32_t lows[4];
        Places::template Nibbles<4>::get(high, a);
        Places::template Nibbles<4>::get(low, lows);
#pragma unroll
        for (int c = 0; c < 4; ++c)
          a[c] = T::fma2(T::fma2(a[c], T::kOne, packed_integer<T>(128 + 16, true)), packed_integer<T>(16), lows[c]);
      }
    }
  }

  // The operand that takes off what decode leaves on in step s: -(base + middle of the codes).
  static __device__ __forceinline__ void bases(int s, uint32_t (&a)[4]) {
    if constexpr (Bits == 2) {
      if (s % 2 == 0) Places::Odd::template bases<T, 2>(a);
      else Places::Even::template bases<T, 2>(a);
    } else if constexpr (Bits <= 4) {
      Places::template Nibbles<Bits>::template bases<T, (1 << (Bits - 1))>(a);
    } else {
      a[0] = a[1] = a[2] = a[3] = kFp16 ? packed_integer<Half>(1024 + 128, true) : 0;
    }
  }

  // A word's scales, from the pair of them that memory has.
  template <int Shift>
  static __device__ __forceinline__ Scale scale(uint32_t pair) {
    Scale scale = {{__byte_perm(pair, 0, 0x1010), __byte_perm(pair, 0, 0x3232)}, {}};
    if constexpr (Shift == 0 && Bits < 5) {
#pragma unroll
      for (int h = 0; h < 2; ++h) scale.pair[h] = T::mul2(scale.pair[h], packed_integer<T>(int(kUnit)));
    }
    return scale;
  }

  // Decoded integers of step s -> the same without bases, which come off exactly in 16 bits.
  static __device__ __forceinline__ void centre(uint32_t (&a)[4], int s) {
    transform(a, s, [](uint32_t v, int) { return v; });
  }

  // The same -> weights: scaled with one rounding in 16 bits; made in fp32 where zeros are taken off (Shift 2).
  template <int Shift>
  static __device__ __forceinline__ void weights(uint32_t (&a)[4], int s, const Scale& scale, float shift) {
    transform(a, s, [&](uint32_t v, int row) {
      if constexpr (Shift == 2) {
        float f[2] = {T::to_float(uint16_t(v)), T::to_float(uint16_t(v >> 16))};
        const float factor = T::to_float(uint16_t(scale.pair[row]));
#pragma unroll
        for (int e = 0; e < 2; ++e) f[e] = (f[e] * kUnit + shift - scale.zero[row]) * factor;
        return T::from_floats(f[0], f[1]);
      }
      if constexpr (Shift == 1) {
        const uint32_t half = T::from_float(shift);
        v = T::fma2(v, packed_integer<T>(int(kUnit)), half | (half << 16));
      }
      return T::mul2(v, scale.pair[row]);
    });
  }

 private:
  template <typename Function>
  static __device__ __forceinline__ void transform(uint32_t (&a)[4], int s, Function function) {
    uint32_t base[4];
    bases(s, base);
#pragma unroll
    for (int c = 0; c < 4; ++c) a[c] = function(kCentred ? a[c] : T::add2(a[c], base[c]), c % 2);
  }
};

// One unit's words -> the A operands of its m16n8k32 steps j = 0, 1, of unsigned bytes: those of the codes' upper nibbles and,
// from 5 bits on, those of their lower ones. Registers c = 2l + h; byte u + 2v of a register is k 32j + 16l + 8u + 2t + v.
//
// A nibble stands for itself, its missing bits 0; at 2 bits a code stands for itself where l = 1 and for four times itself
// where l = 0. Row g + 8 stands for 16 times that plus what row g does: its nibbles are the upper ones of the bytes, and
// what is below them is left on and comes off the sums.
template <int Bits, bool Round>
struct Bytes {
  static constexpr int kOperands = Bits > 4 ? 2 : 1;
  static constexpr uint32_t kMiddle = Bits == 2 ? 0xAAAAAAAAu : 0x88888888u;

  static __device__ __forceinline__ void decode(const uint32_t (&words)[Bits + Round], uint32_t (&operand)[2][kOperands][4]) {
    const Nibbles<Bits, Round> unit(words);
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      set(s, operand[s / 2][0], Bits == 2 ? unit.top[s / 2] : unit.high(s));
      if constexpr (Bits > 4) {
        const uint32_t low = unit.low(s);
        operand[s / 2][1][s % 2 * 2] = low & 0x0F0F0F0Fu, operand[s / 2][1][s % 2 * 2 + 1] = low;
      }
    }
  }

  // The operand of the upper nibbles if every code were the middle of the range.
  static __device__ __forceinline__ void middle(uint32_t (&operand)[4]) { set(0, operand, kMiddle), set(1, operand, kMiddle); }

 private:
  // Step s's half of an operand.
  static __device__ __forceinline__ void set(int s, uint32_t (&operand)[4], uint32_t nibbles) {
    constexpr uint32_t kMissing = Bits == 3 ? 0x11111111u : 0;
    const uint32_t mask = Bits > 2 ? ~kMissing : s % 2 == 0 ? 0xCCCCCCCCu : 0x33333333u;
    operand[s % 2 * 2] = nibbles & mask & 0x0F0F0F0Fu, operand[s % 2 * 2 + 1] = nibbles & mask;
  }
};
