// Storage types in vectors of the compute type: how rows of each are loaded and stored.
#pragma once

#include "csrc/common/dtypes.h"
#include "csrc/common/switch.h"
#include "csrc/cpu/simd.h"

namespace ck::cpu::CK_ISA {

CK_INLINE float to_float(f16 h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16, rest = h.bits & 0x7fffu;
  uint32_t bits;
  float f;
  if (rest >= 0x7c00u) {
    bits = sign | 0x7f800000u | ((rest & 0x3ffu) << 13);
  } else if (rest >= 0x400u) {
    bits = sign | ((rest + 0x1c000u) << 13);
  } else {  // zero or denormal: rest * 2^-24 is exact
    f = static_cast<float>(rest) * 5.9604644775390625e-8f;
    __builtin_memcpy(&bits, &f, 4);
    bits |= sign;
  }
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
CK_INLINE f16 to_half(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (bits >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (bits < 0x38800000u) {  // below the smallest normal: adding 0.5 leaves round(f * 2^24) in the low bits
    float shifted;
    __builtin_memcpy(&shifted, &bits, 4);
    shifted += 0.5f;
    __builtin_memcpy(&bits, &shifted, 4);
    return {static_cast<uint16_t>(sign | (bits - 0x3f000000u))};
  }
  bits += 0xfffu + ((bits >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((bits - 0x38000000u) >> 13))};
}
CK_INLINE float to_float(bf16 h) {
  const uint32_t bits = static_cast<uint32_t>(h.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
CK_INLINE float to_float(float f) { return f; }
CK_INLINE double to_float(double f) { return f; }

CK_INLINE void from_float(float f, bf16& out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  out.bits = static_cast<uint16_t>((f == f ? rounded : bits | 0x400000u) >> 16);
}
CK_INLINE void from_float(float f, f16& out) { out = to_half(f); }
CK_INLINE void from_float(float f, float& out) { out = f; }
CK_INLINE void from_float(double f, double& out) { out = f; }

// How a row of T lies in vectors of the compute type. A unit is the least group of channels that is loaded together:
// kParts vectors. bfloat16 pairs are split into even and odd channels by a shift and a mask, so that lane i of part p
// of a unit is its channel 2 * i + p.
template <class T>
struct Lanes {
  using Elem = T;
  using C = Compute<T>;
  static constexpr int kParts = 1;
  static constexpr int kUnit = kLanes<C>;
  static constexpr int channel(int, int lane) { return lane; }

  template <int kPart>
  static CK_INLINE Vec<C> load(const T* row, int64_t unit) {
    if constexpr (sizeof(T) == sizeof(C)) {
      return load_bytes<Vec<C>>(row + unit * kUnit);
    } else {
#if defined(__AVX512F__)
      return (Vec<C>)_mm512_cvtph_ps(load_bytes<__m256i>(row + unit * kUnit));
#elif defined(__F16C__) && CK_VECTOR_BYTES == 32
      return (Vec<C>)_mm256_cvtph_ps(load_bytes<__m128i>(row + unit * kUnit));
#else
      Vec<C> v = {};
      for (int i = 0; i < kUnit; ++i) v[i] = to_float(row[unit * kUnit + i]);
      return v;
#endif
    }
  }
  static CK_INLINE void store(T* row, int64_t unit, const Vec<C>* v, bool stream) {
    T* p = row + unit * kUnit;
    if constexpr (sizeof(T) == sizeof(C)) {
      if (stream)
        stream_bytes(p, v[0]);
      else
        store_bytes(p, v[0]);
    } else {
#if defined(__AVX512F__)
      store_bytes(p, _mm512_cvtps_ph((__m512)v[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__) && CK_VECTOR_BYTES == 32
      store_bytes(p, _mm256_cvtps_ph((__m256)v[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
      for (int i = 0; i < kUnit; ++i) p[i] = to_half(v[0][i]);
#endif
    }
  }
};

template <>
struct Lanes<bf16> {
  using Elem = bf16;
  using C = float;
  static constexpr int kParts = 2;
  static constexpr int kUnit = 2 * kLanes<float>;
  static constexpr int channel(int part, int lane) { return 2 * lane + part; }

  template <int kPart>
  static CK_INLINE Vec<float> load(const bf16* row, int64_t unit) {
    const auto pair = load_bytes<Vec<uint32_t>>(row + unit * kUnit);
    if constexpr (kPart == 0)
      return (Vec<float>)(pair << 16);
    else
      return (Vec<float>)(pair & 0xffff0000u);
  }
  // Rounded to the nearest, ties to even.
  static CK_INLINE Vec<uint32_t> round_pairs(const Vec<float>* v) {
    using U = Vec<uint32_t>;
    const U even = (U)v[0], odd = (U)v[1];
    const U even_up = v[0] == v[0] ? even + 0x7fffu + ((even >> 16) & 1u) : even | 0x400000u;
    const U odd_up = v[1] == v[1] ? odd + 0x7fffu + ((odd >> 16) & 1u) : odd | 0x400000u;
    return (even_up >> 16) | (odd_up & 0xffff0000u);
  }
  // kAny: any numbers, denormal ones too.
  template <bool kAny = true>
  static CK_INLINE void store(bf16* row, int64_t unit, const Vec<float>* v, bool stream) {
    using U = Vec<uint32_t>;
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
    alignas(64) static const uint16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)v[1], (__m512)v[0]);
    U packed = (U)_mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), halves);
    // The instruction takes denormals for zeros.
    constexpr int kDenormal = 0x20;
    if (kAny &&
        __builtin_expect(
            _mm512_fpclass_ps_mask((__m512)v[0], kDenormal) | _mm512_fpclass_ps_mask((__m512)v[1], kDenormal), 0))
      packed = round_pairs(v);
#else
    const U packed = round_pairs(v);
#endif
    if (stream)
      stream_bytes(row + unit * kUnit, packed);
    else
      store_bytes(row + unit * kUnit, packed);
  }
};

// Rows of T that were converted to the compute type beforehand: the vectors of Lanes<T>, one after the other.
template <class T>
struct Converted {
  using Elem = Compute<T>;
  using C = Compute<T>;
  static constexpr int kParts = Lanes<T>::kParts;
  static constexpr int kUnit = Lanes<T>::kUnit;
  static constexpr int channel(int part, int lane) { return Lanes<T>::channel(part, lane); }

  template <int kPart>
  static CK_INLINE Vec<C> load(const C* row, int64_t unit) {
    return load_bytes<Vec<C>>(row + (unit * kParts + kPart) * kLanes<C>);
  }
  static CK_INLINE void store(C* row, int64_t unit, const Vec<C>* v, bool) {
    for (int p = 0; p < kParts; ++p) store_bytes(row + (unit * kParts + p) * kLanes<C>, v[p]);
  }
};

typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));  // 16 bits for each lane of a float vector

// A vector of contiguous values of T in natural order.
template <class T>
CK_INLINE Vec<Compute<T>> load_natural(const T* p) {
  if constexpr (sizeof(T) == 2 && Lanes<T>::kParts == 2) {
    return (Vec<float>)(__builtin_convertvector(load_bytes<Narrow>(p), Vec<uint32_t>) << 16);
  } else {
    return Lanes<T>::template load<0>(p, 0);
  }
}
// The same where values end at `limit`: what lies beyond it is not touched.
template <class T>
CK_INLINE Vec<Compute<T>> load_natural(const T* p, const T* limit) {
  constexpr int V = kLanes<Compute<T>>;
  if (p + V <= limit) return load_natural(p);
  T copy[V];
  memset(static_cast<void*>(copy), 0, sizeof copy);
  memcpy(static_cast<void*>(copy), p, static_cast<size_t>(limit - p) * sizeof(T));
  return load_natural<T>(copy);
}

// The first n lanes to contiguous memory.
template <class T>
CK_INLINE void store_natural(T* p, Vec<Compute<T>> v, int64_t n) {
  constexpr int V = kLanes<Compute<T>>;
  T copy[V];
  T* const to = n >= V ? p : copy;
  if constexpr (sizeof(T) == 2 && Lanes<T>::kParts == 2) {
    using U = Vec<uint32_t>;
    const U bits = (U)v, rounded = v == v ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | 0x400000u;
    store_bytes(to, __builtin_convertvector(rounded >> 16, Narrow));
  } else {
    Lanes<T>::store(to, 0, &v, false);
  }
  if (n < V) memcpy(static_cast<void*>(p), copy, static_cast<size_t>(n) * sizeof(T));
}

// Asks for the units [first, last) of a row, to be written or to be read. The latter go to the second-level cache,
// because rows at multiples of 1 KiB share a few sets of the first.
enum Access { kRead, kWrite };
template <class Src, Access kAccess>
CK_INLINE void prefetch_row(const typename Src::Elem* row, int64_t first, int64_t last) {
  constexpr int64_t kLine = 64 / sizeof(typename Src::Elem);
  for (int64_t c = first * Src::kUnit; c < last * Src::kUnit; c += kLine) {
    if constexpr (kAccess == kWrite)
      __builtin_prefetch(row + c, 1, 3);
    else
      __builtin_prefetch(row + c, 0, 2);
  }
}
template <class Src, Access kAccess, class Row>
CK_INLINE void prefetch_rows(Row* const* rows, int64_t n, int64_t first, int64_t last) {
  for (int64_t i = 0; i < n; ++i) prefetch_row<Src, kAccess>(rows[i], first, last);
}

}  // namespace ck::cpu::CK_ISA
