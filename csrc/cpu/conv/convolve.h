// The convolution itself: out[i] = sum_k filter(i, k) * in[i + k] over rows of channels.
//
// ConvForward and d(input), shared and position-dependent filters, every storage type and every instruction set share
// this code: what differs is how a filter value is found (the *Taps structs) and how rows lie in vectors (Lanes).
#pragma once

#include "csrc/cpu/conv/epilogue.h"

namespace ck::cpu::CK_ISA {

// Rows and taps that a register tile covers. A tile of shared filters keeps kRows sums and kTapGroup filter values in
// registers; a tile of position-dependent filters keeps kPositionRows x kPositionVectors sums.
#if CK_VECTOR_BYTES == 64
constexpr int kRows = 16, kTapGroup = 8, kPositionVectors = 4;
#else
constexpr int kRows = 8, kTapGroup = 4, kPositionVectors = 2;
#endif
constexpr int kPositionRows = 4;
// Rows of a block of the backward pass: a whole number of vectors, and of tiles. Those of the forward pass have no more
// where filters depend on the position.
constexpr int kBackwardRows = 32;
// Rows behind the last one that an incomplete tile, and the prefetch for the tile after it, look at; where that is for
// the block after it.
constexpr int kMargin = 2 * kRows, kBlockMargin = kBackwardRows + kPositionRows;

// filter(i, k) = base[k * tap] for all rows and channels of a head; the next head's filters lie `head` elements on.
template <class C>
struct SharedTaps {
  static constexpr bool kPerRow = false, kPerChannel = false;
  const C* base;
  int64_t tap, head;
  template <int kParts, int kPart>
  CK_INLINE Vec<C> value(int64_t, int64_t k, int64_t) const {
    return splat(base[k * tap]);
  }
  CK_INLINE SharedTaps at(int64_t, int64_t h) const { return {base + h * head, tap, head}; }
};

// filter(i, k) differs between channels: row k of `base` holds it, converted like the channels.
template <class C>
struct ChannelTaps {
  static constexpr bool kPerRow = false, kPerChannel = true;
  const C* base;
  int64_t tap;
  template <int kParts, int kPart>
  CK_INLINE Vec<C> value(int64_t, int64_t k, int64_t unit) const {
    return load_bytes<Vec<C>>(base + k * tap + (unit * kParts + kPart) * kLanes<C>);
  }
  CK_INLINE ChannelTaps at(int64_t, int64_t) const { return *this; }
};

// filter(i, k) = base[i + k * tap] for all channels of a head.
template <class C>
struct PositionTaps {
  static constexpr bool kPerRow = true, kPerChannel = false;
  const C* base;
  int64_t tap, head;
  template <int kParts, int kPart>
  CK_INLINE Vec<C> value(int64_t i, int64_t k, int64_t) const {
    return splat(base[i + k * tap]);
  }
  CK_INLINE PositionTaps at(int64_t i, int64_t h) const { return {base + i + h * head, tap, head}; }
};

// filter(i, k) differs between rows and channels.
template <class C>
struct PositionChannelTaps {
  static constexpr bool kPerRow = true, kPerChannel = true;
  const C* base;
  int64_t row, tap;
  template <int kParts, int kPart>
  CK_INLINE Vec<C> value(int64_t i, int64_t k, int64_t unit) const {
    return load_bytes<Vec<C>>(base + i * row + k * tap + (unit * kParts + kPart) * kLanes<C>);
  }
  CK_INLINE PositionChannelTaps at(int64_t i, int64_t) const { return {base + i * row, row, tap}; }
};

// Src: how rows lie in vectors (Lanes or Converted); Filter: one of the structs above. Defined in convolve_tiles.h,
// which only the files that instantiate it include: it takes longest to compile.
template <class Src, class Filter>
struct Convolve {
  using C = typename Src::C;
  using Elem = typename Src::Elem;

  // Computes n rows of `units`, whose heads are units_per_head wide. stream: stores bypass the caches.  finish: what
  // the sums go through, or nullptr.
  static void rows(const Elem* const* in, Elem* const* out, int64_t n, int64_t taps, int64_t units,
                   int64_t units_per_head, const Filter& filter, const C* bias, bool stream,
                   const Epilogue<Src>* finish);
};

}  // namespace ck::cpu::CK_ISA
