// Vectors of kVectorBytes bytes through the compiler's vector extension, and the few operations for which it has no
// form.
//
// Everything in the headers of csrc/cpu lives in namespace ck::cpu::CK_ISA: each instruction set compiles its own copy,
// and no inline function of one can stand in for that of another at link time. For the same reason these files use no
// templates of the standard library.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>
#include <utility>

#include "csrc/cpu/scratch.h"

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#define CK_INLINE inline __attribute__((always_inline))
#define CK_INLINE_LAMBDA __attribute__((always_inline))
#define CK_UNROLL _Pragma("GCC unroll 64")

namespace ck::cpu::CK_ISA {

constexpr int kVectorBytes = CK_VECTOR_BYTES;
static_assert((kVectorBytes & (kVectorBytes - 1)) == 0);

template <class S>
struct VectorOf {
  typedef S type __attribute__((vector_size(kVectorBytes)));
};
template <class S>
using Vec = typename VectorOf<S>::type;
template <class S>
constexpr int kLanes = kVectorBytes / sizeof(S);

template <class V>
CK_INLINE V load_bytes(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
CK_INLINE void store_bytes(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

// Stores that bypass the caches, for outputs too large to be read back from them. p is aligned to the vector.
template <class V>
CK_INLINE void stream_bytes(void* p, V v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#endif
#if defined(__AVX__)
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#endif
#if defined(__SSE2__)
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)v);
#endif
  store_bytes(p, v);
}
CK_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class S>
CK_INLINE Vec<S> splat(S s) {
  return s - Vec<S>{};  // the compiler's idiom for a broadcast: s - 0 is exactly s
}

template <class S>
CK_INLINE Vec<S> vmax(Vec<S> a, Vec<S> b) {
  return a > b ? a : b;
}

// Sum and maximum over the lanes, always in the same order.
template <class S, bool kMax>
CK_INLINE S reduce_lanes(Vec<S> v) {
  S lane[kLanes<S>];
  store_bytes(lane, v);
  CK_UNROLL for (int width = kLanes<S> / 2; width > 0; width /= 2) {
    CK_UNROLL for (int i = 0; i < width; ++i) {
      if constexpr (kMax)
        lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
      else
        lane[i] = lane[i] + lane[i + width];
    }
  }
  return lane[0];
}

#if defined(__AVX512F__)
template <>
CK_INLINE float reduce_lanes<float, false>(Vec<float> v) {
  return _mm512_reduce_add_ps((__m512)v);
}
template <>
CK_INLINE float reduce_lanes<float, true>(Vec<float> v) {
  return _mm512_reduce_max_ps((__m512)v);
}
#elif defined(__AVX2__) && CK_VECTOR_BYTES == 32
template <>
CK_INLINE float reduce_lanes<float, false>(Vec<float> v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
template <>
CK_INLINE float reduce_lanes<float, true>(Vec<float> v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
#endif

template <class S>
CK_INLINE S sum_lanes(Vec<S> v) {
  return reduce_lanes<S, false>(v);
}
template <class S>
CK_INLINE S max_lanes(Vec<S> v) {
  return reduce_lanes<S, true>(v);
}

// One round of sum_each: blocks of kWidth lanes alternate between the two operands, and within each operand the lower
// and the upper of two neighbouring blocks are added.
template <class S, int kWidth, int... kLane>
CK_INLINE Vec<S> add_pairs(Vec<S> a, Vec<S> b, std::integer_sequence<int, kLane...>) {
  using Index = Vec<std::conditional_t<sizeof(S) == 4, int32_t, int64_t>>;
  constexpr auto source = [](int lane) {
    const int block = lane / kWidth;
    return block / 2 * 2 * kWidth + lane % kWidth + (block % 2 ? kLanes<S> : 0);
  };
  return __builtin_shuffle(a, b, Index{source(kLane)...}) + __builtin_shuffle(a, b, Index{source(kLane) + kWidth...});
}

// Lane i of the result is the sum over the lanes of a[i]: kLanes vectors are reduced at once by pairwise exchanges.
template <class S, int kWidth = 1>
CK_INLINE Vec<S> sum_each(Vec<S>* a) {
  constexpr int pairs = kLanes<S> / (2 * kWidth);
  CK_UNROLL for (int i = 0; i < pairs; ++i) a[i] =
      add_pairs<S, kWidth>(a[2 * i], a[2 * i + 1], std::make_integer_sequence<int, kLanes<S>>());
  if constexpr (pairs > 1)
    return sum_each<S, 2 * kWidth>(a);
  else
    return a[0];
}

// Lane j of vector i becomes lane i of vector j.
template <class S, int kWidth, int... kLane>
CK_INLINE void transpose_round(Vec<S>* a, std::integer_sequence<int, kLane...>) {
  using Index = Vec<std::conditional_t<sizeof(S) == 4, int32_t, int64_t>>;
  CK_UNROLL for (int i = 0; i < kLanes<S>; ++i) {
    if (i & kWidth) continue;
    const Vec<S> low = a[i], high = a[i + kWidth];
    a[i] = __builtin_shuffle(low, high, Index{(kLane & kWidth ? kLanes<S> + kLane - kWidth : kLane)...});
    a[i + kWidth] = __builtin_shuffle(low, high, Index{(kLane & kWidth ? kLanes<S> + kLane : kLane + kWidth)...});
  }
}
template <class S, int kWidth = 1>
CK_INLINE void transpose(Vec<S>* a) {
  transpose_round<S, kWidth>(a, std::make_integer_sequence<int, kLanes<S>>());
  if constexpr (2 * kWidth < kLanes<S>) transpose<S, 2 * kWidth>(a);
}

// exp(x) with relative error below 2e-7; 0 below about the smallest normal number, so that no denormals arise, and
// infinity where that is the nearest float.
CK_INLINE Vec<float> vexp(Vec<float> x) {
  using F = Vec<float>;
  using I = Vec<int32_t>;
  const F magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const F low = splat(-87.0f), high = splat(88.7228317f);
  const F clamped = x > high ? high : (x < low ? low : x);
  const F shifted = clamped * 1.44269504088896341f + magic;
  const F n = shifted - magic;
  F r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  // Twice the series, for half the power of two: 2^128, which some results need, is no float. At n = -126 half the
  // power is 0.
  F p = splat(2 * 1.9875691500e-4f);
  p = p * r + 2 * 1.3981999507e-3f;
  p = p * r + 2 * 8.3334519073e-3f;
  p = p * r + 2 * 4.1665795894e-2f;
  p = p * r + 2 * 1.6666665459e-1f;
  p = p * r + 2 * 5.0000001201e-1f;
  p = p * (r * r) + (r * 2.0f + 2.0f);
  const I exponent = ((I)shifted - (I)magic + 126) << 23;
  const F value = p * (F)exponent;
  return x > high ? splat(__builtin_inff()) : value;
}
CK_INLINE Vec<double> vexp(Vec<double> x) {
  Vec<double> y = {};
  for (int i = 0; i < kLanes<double>; ++i) y[i] = ::exp(x[i]);
  return y;
}

// a * b + c, rounded once, where kFused says that there are instructions for that.
#if (defined(__AVX512F__) && CK_VECTOR_BYTES == 64) || (defined(__FMA__) && CK_VECTOR_BYTES == 32)
constexpr bool kFused = true;

template <class S>
CK_INLINE Vec<S> vfused(Vec<S> a, Vec<S> b, Vec<S> c) {
  constexpr bool kSingle = sizeof(S) == sizeof(float);
#if CK_VECTOR_BYTES == 64
  if constexpr (kSingle) return (Vec<S>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  if constexpr (!kSingle) return (Vec<S>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#else
  if constexpr (kSingle) return (Vec<S>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  if constexpr (!kSingle) return (Vec<S>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#endif
}
#else
constexpr bool kFused = false;

template <class S>
Vec<S> vfused(Vec<S> a, Vec<S> b, Vec<S> c) = delete;
#endif

// What 2^x takes in each type. kSeries: of (2^r - 1) / r for |r| <= 1/2, highest power first, by interpolation in
// Chebyshev points. Adding kRound rounds to the nearest integer, and leaves it in the low bits with the exponent's
// bias.
template <class S>
struct Exp2;
template <>
struct Exp2<float> {
  using Bits = int32_t;
  static constexpr int kMantissa = 23;
  static constexpr float kLow = -126, kRound = 12582912.0f + 127;  // 1.5 * 2^23
  static constexpr float kSeries[] = {1.54531634e-4f,   1.3390863314e-3f,  9.618083015e-3f,
                                      5.5503569543e-2f, 2.40226507187e-1f, 6.93147182465e-1f};
};
template <>
struct Exp2<double> {
  using Bits = int64_t;
  static constexpr int kMantissa = 52;
  static constexpr double kLow = -1022, kRound = 6755399441055744.0 + 1023;  // 1.5 * 2^52
  static constexpr double kSeries[] = {4.45496059818651839e-10, 7.0725859492692237e-9,  1.01780624458457735e-7,
                                       1.32154425879216897e-6,  1.52527338298361184e-5, 1.54035304417360502e-4,
                                       1.33335581464169353e-3,  9.61812910760688853e-3, 5.55041086648215943e-2,
                                       2.40226506959100982e-1,  6.93147180559945309e-1};
};

// 2^x for x between -126 and 127 (-1022 and 1023), and 0 for -infinity, with relative error below 1.2e-7 (2.3e-16). NaN
// stays NaN.  rest: what x lacks, far below 1; it may be left out.  kHalf: half of that, for x up to 128 (1024).
template <class S, bool kHalf = false, class... Rest>
CK_INLINE Vec<S> vexp2_bounded(Vec<S> x, Rest... rest) {
#if defined(__AVX512DQ__) && CK_VECTOR_BYTES == 64 && !defined(CK_BASE)
  // But for kernel sets on top of another one, whose bits are those of any machine.
  if constexpr (sizeof(S) == sizeof(float) && !kHalf) {
    // Of (2^r - 1) / r for r from 0 to 1, as in Exp2: these instructions round down.
    constexpr float kSeries[] = {2.081791463e-4f,  1.2692166492e-3f,  9.6521954983e-3f,
                                 5.5496022105e-2f, 2.40227207541e-1f, 6.93147182465e-1f};
    const Vec<S> r = ((Vec<S>)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF) + ... + rest);
    Vec<S> y = splat(kSeries[0]);
    CK_UNROLL for (size_t i = 1; i < sizeof kSeries / sizeof(S); ++i) y = y * r + kSeries[i];
    return (Vec<S>)_mm512_scalef_ps((__m512)(y * r + S{1}), (__m512)x);
  }
#endif
  using E = Exp2<S>;
  using I = Vec<typename E::Bits>;
  // There the bits of the exponent are 0, and with them the result.
  const Vec<S> low = splat(E::kLow - 1 + kHalf), clamped = x < low ? low : x;
  const S round = E::kRound - kHalf;
  const Vec<S> shifted = clamped + round;
  const Vec<S> r = ((clamped - (shifted - round)) + ... + rest);
  Vec<S> y = splat(E::kSeries[0]);
  CK_UNROLL for (size_t i = 1; i < sizeof E::kSeries / sizeof(S); ++i) y = y * r + E::kSeries[i];
  y = y * r + S{1};
  return y * (Vec<S>)((I)shifted << E::kMantissa);
}

// 2^x for x below 127 (1023), with the same error; 0 below 2^-126 (2^-1022), so that no denormals arise.
template <class S>
CK_INLINE Vec<S> vexp2(Vec<S> x) {
  return x < splat(Exp2<S>::kLow) ? Vec<S>{} : vexp2_bounded<S>(x);
}

// 1 / (1 + exp(-x)); 0 where exp(-x) is no finite number. kClose: to two units in the last place; otherwise the error
// grows with |x|, by a unit for each 1.
template <class S, bool kClose>
CK_INLINE Vec<S> vsigmoid(Vec<S> x) {
  constexpr double kFactor = -1.44269504088896340736;
  constexpr S kHigh = static_cast<S>(kFactor), kRest = static_cast<S>(sizeof(S) == 4 ? kFactor - kHigh : -2.0355e-17);
  const Vec<S> low = splat(Exp2<S>::kLow), high = splat(2 - Exp2<S>::kLow), product = x * kHigh;
  const auto finite = [&](auto... rest) CK_INLINE_LAMBDA {
#if defined(__AVX512DQ__) && CK_VECTOR_BYTES == 64 && !defined(CK_BASE)
    if constexpr (sizeof(S) == sizeof(float)) {  // a step of Newton's method takes less time than a division
      const Vec<S> below = splat(S{1}) + vexp2_bounded<S>(product, rest...);
      const Vec<S> near = (Vec<S>)_mm512_rcp14_ps((__m512)below);
      return near + near * (splat(S{1}) - below * near);
    }
#endif
    // Halves, because the power itself may be too large where half of it is not.
    const Vec<S> power = product > high ? high : product;
    return splat(S{0.5}) / (splat(S{0.5}) + vexp2_bounded<S, true>(power, rest...));
  };
  Vec<S> result;
  if constexpr (kClose && !kFused) {
    result = splat(S{1}) / (splat(S{1}) + vexp(-x));
  } else if constexpr (kClose) {  // with what both roundings of -x / log(2) have left out
    const Vec<S> rest = vfused<S>(x, splat(kHigh), -product) + x * kRest;
    result = finite(product > low && product < high ? rest : Vec<S>{});
  } else {
    result = finite();
  }
  return product >= high ? Vec<S>{} : result;
}

CK_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
CK_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
CK_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
CK_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace ck::cpu::CK_ISA
