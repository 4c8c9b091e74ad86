// The gradient of the filters: sum over rows and channels of grad[i] * in[i + k].
#pragma once

#include "csrc/cpu/conv/convolve.h"

namespace ck::cpu::CK_ISA {

// Rows whose gradients of position-dependent filters are computed together.
constexpr int kDotRows = 2;

// Src: how rows lie in vectors. Defined in correlate_tiles.h, which only the files that instantiate it include.
template <class Src>
struct Correlate {
  using C = typename Src::C;
  using Elem = typename Src::Elem;

  // Filters shared by all positions: adds n rows of the units [first, last) to out[k * stride], for the channels of one
  // head, whose lanes still have to be summed.
  static void heads(const Elem* const* in, const Elem* const* grad, int64_t n, int64_t taps, int64_t first,
                    int64_t last, C* out, int64_t stride);
  // The same per channel: to out[k * stride + vector of the row].
  static void channels(const Elem* const* in, const Elem* const* grad, int64_t n, int64_t taps, int64_t first,
                       int64_t last, C* out, int64_t stride);
  // Filters that depend on the position: out[i * row + k] = sum over the units [first, last) of grad[i] * in[i + k],
  // for kDotRows rows. Up to a vector behind the last tap is overwritten.
  static void positions(const Elem* const* in, const Elem* const* grad, int64_t taps, int64_t first, int64_t last,
                        C* out, int64_t row);
};

// Filters that depend on the position where heads do not cover whole units: products per channel first, then one head
// after the other.
template <class Src>
inline void dot_taps_of_channels(const typename Src::Elem* const* in, const typename Src::Elem* grad, int64_t taps,
                                 int64_t units, int64_t channels, int64_t channels_per_head, typename Src::C* product,
                                 typename Src::C* out) {
  using C = typename Src::C;
  constexpr int V = kLanes<C>, P = Src::kParts;
  for (int64_t k = 0; k < taps; ++k) {
    for (int64_t unit = 0; unit < units; ++unit) {
      store_bytes(product + unit * P * V, Src::template load<0>(grad, unit) * Src::template load<0>(in[k], unit));
      if constexpr (P == 2)
        store_bytes(product + (unit * P + 1) * V,
                    Src::template load<1>(grad, unit) * Src::template load<1>(in[k], unit));
    }
    for (int64_t c = 0; c < channels; ++c) {
      out[c / channels_per_head * taps + k] += product[vector_position<Src>(c)];
    }
  }
}

}  // namespace ck::cpu::CK_ISA
