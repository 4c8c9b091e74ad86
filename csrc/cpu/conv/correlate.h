// The gradient of the filters: sum over rows and channels of grad[i] * in[i + k].
#pragma once

#include "csrc/cpu/lanes.h"

namespace ck::cpu::CK_ISA {

// Rows and taps whose gradients of position-dependent filters are computed together: their sums fill the lanes of a
// vector.
#if CK_VECTOR_BYTES == 64
constexpr int kDotRows = 4;
#else
constexpr int kDotRows = 2;
#endif
template <class C>
constexpr int kDotTaps = kLanes<C> / kDotRows;

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
  // Filters that depend on the position: out[k * pitch + i] = sum over the units [first, last) of grad[i] * in[i + k],
  // for kDotRows rows. Up to kDotTaps - 1 taps behind the last one are overwritten.
  static void positions(const Elem* const* in, const Elem* const* grad, int64_t taps, int64_t first, int64_t last,
                        C* out, int64_t pitch);
};

}  // namespace ck::cpu::CK_ISA
