// Sixteen floats at a time, as kernels on tiles need them: the same bits from AVX-512, from AVX2 and from plain C++.
// Nothing is contracted but what is written as fused. Attention has FlushDenormals on wherever it uses these.
#pragma once

#include "csrc/cpu/lanes.h"
#include "csrc/cpu/tiles.h"

namespace ck::cpu::CK_ISA {

static_assert(kVectorBytes == 64, "a row of a tile is one vector");

using Floats = Vec<float>;
using Words = Vec<uint32_t>;
typedef uint16_t Halves __attribute__((vector_size(64)));

CK_INLINE Floats load_floats(const float* p) { return load_bytes<Floats>(p); }
CK_INLINE Words load_words(const void* p) { return load_bytes<Words>(p); }

// Where a bit of the mask is not set, 0.
CK_INLINE Floats keep_lanes(uint32_t mask, Floats v) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_mov_ps(static_cast<__mmask16>(mask), (__m512)v);
#else
  constexpr Words kLane = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  return (splat(mask) & kLane) != Words{} ? v : Floats{};
#endif
}
CK_INLINE Words keep_lanes(uint32_t mask, Words v) { return (Words)keep_lanes(mask, (Floats)v); }

CK_INLINE Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  __m256 x[2], y[2], z[2];
  __builtin_memcpy(x, &a, 64);
  __builtin_memcpy(y, &b, 64);
  __builtin_memcpy(z, &c, 64);
  CK_UNROLL for (int i = 0; i < 2; ++i) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
  return load_bytes<Floats>(z);
#else
  CK_UNROLL for (int i = 0; i < 16; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#endif
}

CK_INLINE Floats square_root(Floats v) {
#if defined(__AVX512F__)
  return (Floats)_mm512_sqrt_ps((__m512)v);
#else
  CK_UNROLL for (int i = 0; i < 16; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// The greatest integer that is not above x, for |x| below 2^31.
CK_INLINE Floats floor_of(Floats x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_floor_ps((__m512)x);
#else
  CK_UNROLL for (int i = 0; i < 16; ++i) x[i] = __builtin_floorf(x[i]);
  return x;
#endif
}

// x - floor(x), rounded down, so that it is below 1; 0 for infinities.
CK_INLINE Floats fraction_of(Floats x) {
#if defined(__AVX512DQ__)
  return (Floats)_mm512_reduce_ps((__m512)x, 1);
#else
  const Floats whole = floor_of(x), rest = x - whole, back = rest - x, error = (x - (rest - back)) + (-whole - back);
  const Words down = (Words)rest - (error < Floats{} ? splat(1u) : Words{});
  const Words size = (Words)x & 0x7fffffffu;
  return size == 0x7f800000u ? Floats{} : (Floats)down;
#endif
}

// p * 2^floor(x), p in (0, 2^127) or NaN; x may be infinite.
CK_INLINE Floats scale_by_power(Floats p, Floats x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  // Four factors, each a normal number, of which only the last may leave the normal numbers.
  using Integers = Vec<int32_t>;
  const Floats whole = floor_of(x), least = splat(-500.0f), most = splat(500.0f);
  const Floats within = whole > most ? most : (whole < least ? least : whole);
  const Floats number = x == x ? within : Floats{};
  const Integers n = __builtin_convertvector(number, Integers);
  for (int i = 0; i < 4; ++i) {
    const Integers part = (n + i) >> 2;
    p *= (Floats)((part + 127) << 23);
  }
  return x == x ? p : x;
#endif
}

// 2^x from its fraction: relative error below 5e-6.
struct PowerSeries {
  Floats term[5];

  // Of 2^x * factor, where factor is a power of two: the same bits but for the exponent.
  explicit PowerSeries(float factor) {
    constexpr float kTerms[] = {0.0135341679f, 0.0520114606f, 0.241442757f, 0.693003834f, 1.00000259f};
    for (int i = 0; i < 5; ++i) term[i] = splat(kTerms[i] * factor);
  }
  CK_INLINE Floats operator()(Floats fraction) const {
    Floats p = term[0];
    CK_UNROLL for (int i = 1; i < 5; ++i) p = fused(p, fraction, term[i]);
    return p;
  }
  CK_INLINE Floats power(Floats x) const { return scale_by_power((*this)(fraction_of(x)), x); }
};

// log2(x) + shift for x >= 0 that is no denormal; shift is an integer. NaN and infinity stay what they are.
CK_INLINE Floats log2_plus(Floats x, Floats shift) {
  using Integers = Vec<int32_t>;
  const Words bits = (Words)x, mantissa = bits & 0x7fffffu;
  const Words high = mantissa >= 0x400000u ? splat(1u) : Words{};  // from 1.5 on the next power is nearer
  const Floats m = (Floats)(mantissa | ((127u - high) << 23));
  const Floats power = __builtin_convertvector((Integers)((bits >> 23) + high) - 127, Floats);
  const Floats t = (m - 1.0f) / (m + 1.0f), s = t * t;
  Floats p = fused(s, splat(0.32059889f), splat(0.41219858f));
  p = fused(p, s, splat(0.57707802f));
  p = fused(p, s, splat(0.96179669f));
  p = fused(p, s, splat(2.8853900f));
  const Floats value = fused(p, t, power + shift), far = x + shift;
  return (bits & 0x7f800000u) == 0x7f800000u ? far : value;
}

// The two bfloat16 numbers of each word.
CK_INLINE Floats low_halves(Words v) { return (Floats)(v << 16); }
CK_INLINE Floats high_halves(Words v) { return (Floats)(v & 0xffff0000u); }

// 32 bfloat16 numbers in their order.
CK_INLINE void widen(Words pairs, Floats& first, Floats& second) {
  Narrow halves[2];
  __builtin_memcpy(halves, &pairs, 64);
  first = (Floats)(__builtin_convertvector(halves[0], Words) << 16);
  second = (Floats)(__builtin_convertvector(halves[1], Words) << 16);
}

// To the nearest bfloat16, ties away from zero: the upper halves. NaN stays NaN if its lower half is not all ones, as
// in those that come from bfloat16 numbers or from nothing, and from float32 numbers that are read by with_plain_nan.
CK_INLINE Words rounded(Floats v) { return (Words)v + 0x8000u; }
// NaN of any bits, such as those of GPUs, which are all ones, becomes one that arithmetic hands on and `rounded` keeps.
CK_INLINE float with_plain_nan(float v) { return v == v ? v : __builtin_nanf(""); }

// Lane by lane the least of before and of the magnitudes of 32 bfloat16 numbers, one less than their bits, so that 0 is
// the greatest.
CK_INLINE Halves least_magnitude(Words numbers, Halves before) {
  const Halves magnitude = ((Halves)numbers & 0x7fff) - 1;
  return magnitude < before ? magnitude : before;
}

// Whether any bit is set.
CK_INLINE bool any_bit(Words v) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)v, (__m512i)v) != 0;
#else
  const auto pairs = (Vec<uint64_t>)v;
  uint64_t any = 0;
  for (int i = 0; i < 8; ++i) any |= pairs[i];
  return any != 0;
#endif
}

// Pairs of lower halves, and of upper halves.
CK_INLINE Words join_lower_halves(Words even, Words odd) {
#if defined(__AVX512F__)
  constexpr int kSelect = 0xd8;  // c ? b : a
  return (Words)_mm512_ternarylogic_epi32((__m512i)(odd << 16), (__m512i)even, _mm512_set1_epi32(0xffff), kSelect);
#else
  return (even & 0xffffu) | (odd << 16);
#endif
}
CK_INLINE Words join_halves(Words even, Words odd) {
#if defined(__AVX512F__)
  constexpr int kFirstOrBoth = 0xf8;  // a | (b & c)
  return (Words)_mm512_ternarylogic_epi32((__m512i)(even >> 16), (__m512i)odd, _mm512_set1_epi32(0xffff0000),
                                          kFirstOrBoth);
#else
  return (even >> 16) | (odd & 0xffff0000u);
#endif
}

// Within each quarter, words of a and b in turn: of its first half, and of its second.
template <int... kLane>
CK_INLINE void interleave_halves(Words a, Words b, Words& low, Words& high, std::integer_sequence<int, kLane...>) {
  const Halves x = (Halves)a, y = (Halves)b;
  low = (Words)__builtin_shuffle(x, y, Halves{(kLane / 8 * 8 + kLane % 8 / 2 + kLane % 2 * 32)...});
  high = (Words)__builtin_shuffle(x, y, Halves{(kLane / 8 * 8 + 4 + kLane % 8 / 2 + kLane % 2 * 32)...});
}
CK_INLINE void interleave_halves(Words a, Words b, Words& low, Words& high) {
  interleave_halves(a, b, low, high, std::make_integer_sequence<int, 32>());
}

// From the columns of a pair of tiles whose rows interleave_halves made, to their order before.
CK_INLINE void restore_order(Floats a, Floats b, Floats& first, Floats& second) {
  using Index = Vec<int32_t>;
  first = __builtin_shuffle(a, b, Index{0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23});
  second = __builtin_shuffle(a, b, Index{8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31});
}

// 32 floats, none of them denormal, to the nearest bfloat16, ties to even.
CK_INLINE Halves to_bf16(Floats first, Floats second) {
#if defined(__AVX512BF16__)
  return (Halves)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#else
  const auto narrow = [](Floats v) CK_INLINE_LAMBDA {
    const Words bits = (Words)v, up = v == v ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
    return __builtin_convertvector(up >> 16, Narrow);
  };
  const Narrow parts[2] = {narrow(first), narrow(second)};
  return load_bytes<Halves>(parts);
#endif
}

// The same of numbers that are bfloat16 already.
template <int... kLane>
CK_INLINE Halves restore_order(Halves v, std::integer_sequence<int, kLane...>) {
  return __builtin_shuffle(v, Halves{(kLane / 8 * 4 + kLane % 8 / 4 * 16 + kLane % 4)...});
}
CK_INLINE Halves restore_order(Halves v) { return restore_order(v, std::make_integer_sequence<int, 32>()); }

// The first n of 32 numbers, then zeros; and back.
CK_INLINE Words load_part(const bf16* p, int64_t n) {
  if (n >= 32) return load_words(p);
#if defined(__AVX512BW__)
  return (Words)_mm512_maskz_loadu_epi16(n <= 0 ? 0u : (1u << n) - 1u, p);
#else
  Words v = {};
  if (n > 0) memcpy(&v, p, static_cast<size_t>(n) * 2);
  return v;
#endif
}
CK_INLINE void store_part(bf16* p, Halves v, int64_t n) {
  if (n >= 32) return store_bytes(p, v);
#if defined(__AVX512BW__)
  _mm512_mask_storeu_epi16(p, n <= 0 ? 0u : (1u << n) - 1u, (__m512i)v);
#else
  if (n > 0) memcpy(static_cast<void*>(p), &v, static_cast<size_t>(n) * 2);
#endif
}

// 16 rows of 16 words, found by row_of(i), become columns. The first two of the four rounds are done by loads.
template <class RowOf>
CK_INLINE void transpose_rows(const RowOf& row_of, Words* out) {
#if defined(__AVX512F__)
  CK_UNROLL for (int q = 0; q < 4; ++q) {
    __m512i part[4];  // quarter q of rows i, i + 4, i + 8 and i + 12
    CK_UNROLL for (int i = 0; i < 4; ++i) {
      const auto quarter = [&](int row) CK_INLINE_LAMBDA { return load_bytes<__m128i>(row_of(i + row) + 16 * q); };
      part[i] = _mm512_castsi128_si512(quarter(0));
      part[i] = _mm512_mask_broadcast_i32x4(part[i], 0x00f0, quarter(4));
      part[i] = _mm512_mask_broadcast_i32x4(part[i], 0x0f00, quarter(8));
      part[i] = _mm512_mask_broadcast_i32x4(part[i], 0xf000, quarter(12));
    }
    const __m512i a = _mm512_unpacklo_epi32(part[0], part[1]), b = _mm512_unpackhi_epi32(part[0], part[1]);
    const __m512i c = _mm512_unpacklo_epi32(part[2], part[3]), d = _mm512_unpackhi_epi32(part[2], part[3]);
    out[4 * q] = (Words)_mm512_unpacklo_epi64(a, c);
    out[4 * q + 1] = (Words)_mm512_unpackhi_epi64(a, c);
    out[4 * q + 2] = (Words)_mm512_unpacklo_epi64(b, d);
    out[4 * q + 3] = (Words)_mm512_unpackhi_epi64(b, d);
  }
#else
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 16; ++c) out[c][r] = load_bytes<uint32_t>(row_of(r) + 4 * c);
#endif
}
CK_INLINE void transpose_words(const void* rows, int64_t row_bytes, Words* out) {
  const char* const first = static_cast<const char*>(rows);
  transpose_rows([&](int64_t i) CK_INLINE_LAMBDA { return first + i * row_bytes; }, out);
}

// The greatest lane, NaN aside; -inf if there is none.
CK_INLINE float greatest(Floats v) {
  float most = -__builtin_inff();
  for (int i = 0; i < 16; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

}  // namespace ck::cpu::CK_ISA
