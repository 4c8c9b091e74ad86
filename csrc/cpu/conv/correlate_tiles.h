// The register tiles of the gradient of the filters. Included only by the files that instantiate Correlate.
#pragma once

#include "csrc/cpu/conv/correlate.h"

namespace ck::cpu::CK_ISA {

constexpr int kGradientRows = 8;
#if CK_VECTOR_BYTES == 64
constexpr int kGradientTaps = 8, kChains = 2;
#else
constexpr int kGradientTaps = 7, kChains = 1;  // seven sums and a window of seven rows fill sixteen registers
#endif

// Adds one part of one unit of kCount rows to kTaps sums (kChains of each, to hide the latency of the addition).
template <class Src, int kPart, int kTaps, int kCount>
CK_INLINE void correlate_rows(Vec<typename Src::C> (&sum)[kChains][kTaps], const typename Src::Elem* const* in,
                              const typename Src::Elem* const* grad, int64_t unit) {
  Vec<typename Src::C> window[kTaps];
  CK_UNROLL for (int k = 0; k < kTaps - 1; ++k) window[k] = Src::template load<kPart>(in[k], unit);
  CK_UNROLL for (int i = 0; i < kCount; ++i) {
    window[(i + kTaps - 1) % kTaps] = Src::template load<kPart>(in[i + kTaps - 1], unit);
    const Vec<typename Src::C> g = Src::template load<kPart>(grad[i], unit);
    CK_UNROLL for (int k = 0; k < kTaps; ++k) sum[i % kChains][k] += g * window[(i + k) % kTaps];
  }
}

template <class Src, int kTaps, bool kPerChannel, int kCount>
CK_INLINE void correlate_taps(const typename Src::Elem* const* in, const typename Src::Elem* const* grad, int64_t first,
                              int64_t last, typename Src::C* out, int64_t stride) {
  using C = typename Src::C;
  constexpr int V = kLanes<C>;
  const auto load = [&](Vec<C>(&sum)[kChains][kTaps], const C* from) CK_INLINE_LAMBDA {
    CK_UNROLL for (int k = 0; k < kTaps; ++k) {
      sum[0][k] = load_bytes<Vec<C>>(from + k * stride);
      if constexpr (kChains == 2) sum[kChains - 1][k] = Vec<C>{};
    }
  };
  const auto store = [&](Vec<C>(&sum)[kChains][kTaps], C* to) CK_INLINE_LAMBDA {
    CK_UNROLL for (int k = 0; k < kTaps; ++k)
        store_bytes(to + k * stride, kChains == 2 ? sum[0][k] + sum[kChains - 1][k] : sum[0][k]);
  };
  Vec<C> sum[kChains][kTaps];
  if constexpr (kPerChannel) {
    for (int64_t unit = first; unit < last; ++unit) {
      load(sum, out + unit * Src::kParts * V);
      correlate_rows<Src, 0, kTaps, kCount>(sum, in, grad, unit);
      store(sum, out + unit * Src::kParts * V);
      if constexpr (Src::kParts == 2) {
        load(sum, out + (unit * 2 + 1) * V);
        correlate_rows<Src, 1, kTaps, kCount>(sum, in, grad, unit);
        store(sum, out + (unit * 2 + 1) * V);
      }
    }
  } else {
    load(sum, out);
    for (int64_t unit = first; unit < last; ++unit) {
      correlate_rows<Src, 0, kTaps, kCount>(sum, in, grad, unit);
      if constexpr (Src::kParts == 2) correlate_rows<Src, 1, kTaps, kCount>(sum, in, grad, unit);
    }
    store(sum, out);
  }
}

template <class Src, bool kPerChannel, int kCount>
inline void correlate_block(const typename Src::Elem* const* in, const typename Src::Elem* const* grad, int64_t taps,
                            int64_t first, int64_t last, typename Src::C* out, int64_t stride) {
  int64_t k = 0;
  for (; k + kGradientTaps <= taps; k += kGradientTaps)
    correlate_taps<Src, kGradientTaps, kPerChannel, kCount>(in + k, grad, first, last, out + k * stride, stride);
  switch (taps - k) {
#define CK_CASE(n) \
  case n: return correlate_taps<Src, n, kPerChannel, kCount>(in + k, grad, first, last, out + k * stride, stride)
    CK_CASE(1);
    CK_CASE(2);
    CK_CASE(3);
    CK_CASE(4);
    CK_CASE(5);
    CK_CASE(6);
#if CK_VECTOR_BYTES == 64
    CK_CASE(7);
#endif
#undef CK_CASE
  }
}

// Rows behind the n-th are not read: a NaN there would otherwise reach taps that never meet it.
template <class Src, bool kPerChannel>
inline void correlate_all(const typename Src::Elem* const* in, const typename Src::Elem* const* grad, int64_t n,
                          int64_t taps, int64_t first, int64_t last, typename Src::C* out, int64_t stride) {
  int64_t i = 0;
  for (; i + kGradientRows <= n; i += kGradientRows)
    correlate_block<Src, kPerChannel, kGradientRows>(in + i, grad + i, taps, first, last, out, stride);
  for (; i < n; ++i) correlate_block<Src, kPerChannel, 1>(in + i, grad + i, taps, first, last, out, stride);
}

template <class Src>
void Correlate<Src>::heads(const Elem* const* in, const Elem* const* grad, int64_t n, int64_t taps, int64_t first,
                           int64_t last, C* out, int64_t stride) {
  correlate_all<Src, false>(in, grad, n, taps, first, last, out, stride);
}

template <class Src>
void Correlate<Src>::channels(const Elem* const* in, const Elem* const* grad, int64_t n, int64_t taps, int64_t first,
                              int64_t last, C* out, int64_t stride) {
  correlate_all<Src, true>(in, grad, n, taps, first, last, out, stride);
}

// Sums are ordered by tap, then by row, so that those of a tap lie next to each other in their total.
template <class Src>
void Correlate<Src>::positions(const Elem* const* in, const Elem* const* grad, int64_t taps, int64_t first,
                               int64_t last, C* out, int64_t pitch) {
  constexpr int kTaps = kDotTaps<C>;
  typedef C Piece __attribute__((vector_size(kDotRows * sizeof(C))));
  const auto accumulate = [&]<int kPart>(Vec<C>(&sum)[kTaps* kDotRows], int64_t k0, int64_t unit) CK_INLINE_LAMBDA {
    Vec<C> g[kDotRows];
    CK_UNROLL for (int i = 0; i < kDotRows; ++i) g[i] = Src::template load<kPart>(grad[i], unit);
    CK_UNROLL for (int q = 0; q < kDotRows + kTaps - 1; ++q) {
      const Vec<C> x = Src::template load<kPart>(in[k0 + q], unit);
      CK_UNROLL for (int i = 0; i < kDotRows; ++i) if (q - i >= 0 && q - i < kTaps) sum[(q - i) * kDotRows + i] +=
          g[i] * x;
    }
  };
  for (int64_t k0 = 0; k0 < taps; k0 += kTaps) {
    Vec<C> sum[kTaps * kDotRows];
    CK_UNROLL for (int i = 0; i < kTaps * kDotRows; ++i) sum[i] = Vec<C>{};
    const auto add = [&](int64_t unit) CK_INLINE_LAMBDA {
      accumulate.template operator()<0>(sum, k0, unit);
      if constexpr (Src::kParts == 2) accumulate.template operator()<1>(sum, k0, unit);
    };
    if constexpr (Src::kParts == 1) {
      // Heads have few units, and a loop that ends after so few rounds stalls where it does.
      _Pragma("GCC unroll 8") for (int64_t unit = first; unit < last; ++unit) add(unit);
    } else {
      for (int64_t unit = first; unit < last; ++unit) add(unit);
    }
    const Vec<C> total = sum_each<C>(sum);
    Piece pieces[kTaps];
    __builtin_memcpy(pieces, &total, sizeof total);
    CK_UNROLL for (int k = 0; k < kTaps; ++k) store_bytes(out + (k0 + k) * pitch, pieces[k]);
  }
}

}  // namespace ck::cpu::CK_ISA
