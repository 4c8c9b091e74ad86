// The register tiles of the convolution. Included only by the files that instantiate Convolve.
#pragma once

#include "csrc/cpu/conv/convolve.h"

namespace ck::cpu::CK_ISA {

// A register tile: kTileRows rows by the parts [kFirst, kLast) of kUnits units.
template <class Src, class Filter, int kTileRows, int kUnits, int kFirst, int kLast>
struct Tile {
  using C = typename Src::C;
  using Elem = typename Src::Elem;
  static constexpr int kWidth = kLast - kFirst;
  Vec<C> sum[kTileRows][kUnits * kWidth];

  template <int kTaps>
  CK_INLINE void add(const Elem* const* in, int64_t unit, const Filter& filter, int64_t k0) {
    constexpr int kHeld = Filter::kPerRow ? 1 : kTaps;
    Vec<C> held[kHeld];
    if constexpr (!Filter::kPerRow) {
      CK_UNROLL for (int k = 0; k < kTaps; ++k) held[k] = filter.template value<Src::kParts, kFirst>(0, k0 + k, unit);
    }
    CK_UNROLL for (int q = 0; q < kTileRows + kTaps - 1; ++q) {
      const Elem* const row = in[k0 + q];
      Vec<C> x[kUnits * kWidth];
      CK_UNROLL for (int u = 0; u < kUnits; ++u) {
        x[u * kWidth] = Src::template load<kFirst>(row, unit + u);
        if constexpr (kWidth == 2) x[u * kWidth + 1] = Src::template load<1>(row, unit + u);
      }
      CK_UNROLL for (int k = 0; k < kTaps; ++k) {
        const int i = q - k;
        if (i < 0 || i >= kTileRows) continue;
        CK_UNROLL for (int u = 0; u < kUnits; ++u) {
          CK_UNROLL for (int p = 0; p < kWidth; ++p) {
            if constexpr (Filter::kPerRow)
              sum[i][u * kWidth + p] +=
                  x[u * kWidth + p] * (p == 0 ? filter.template value<Src::kParts, kFirst>(i, k0 + k, unit + u)
                                              : filter.template value<Src::kParts, kLast - 1>(i, k0 + k, unit + u));
            else
              sum[i][u * kWidth + p] += held[k] * x[u * kWidth + p];
          }
        }
      }
    }
  }

  CK_INLINE void run(const Elem* const* in, int64_t unit, const Filter& filter, int64_t taps, const C* bias) {
    CK_UNROLL for (int i = 0; i < kTileRows; ++i) {
      CK_UNROLL for (int v = 0; v < kUnits * kWidth; ++v) {
        const int64_t vector = (unit + v / kWidth) * Src::kParts + kFirst + v % kWidth;
        sum[i][v] = bias != nullptr ? load_bytes<Vec<C>>(bias + vector * kLanes<C>) : Vec<C>{};
      }
    }
    int64_t k = 0;
    for (; k + kTapGroup <= taps; k += kTapGroup) add<kTapGroup>(in, unit, filter, k);
    if constexpr (kTapGroup > 4) {
      if (taps - k >= 4) {
        add<4>(in, unit, filter, k);
        k += 4;
      }
    }
    switch (taps - k) {
      case 3: return add<3>(in, unit, filter, k);
      case 2: return add<2>(in, unit, filter, k);
      case 1: return add<1>(in, unit, filter, k);
    }
  }
};

// Stores the rows of a tile: `value(i)` gives the vectors of row i. All rows of a full tile go without a question.
template <class Src, int kTileRows, class Value>
CK_INLINE void store_rows(typename Src::Elem* const* out, int rows, int64_t unit, bool stream, const Value& value) {
  if (rows == kTileRows && !stream) {
    CK_UNROLL for (int i = 0; i < kTileRows; ++i) Src::store(out[i], unit, value(i), false);
  } else {
    CK_UNROLL for (int i = 0; i < kTileRows; ++i) if (i < rows) Src::store(out[i], unit, value(i), stream);
  }
}

// Asks for the rows that the next tile adds to the window, while this one computes.
template <class Src, int kTileRows>
CK_INLINE void prefetch_rows(const typename Src::Elem* const* in, int64_t taps, int64_t unit) {
  constexpr int kLine = 64 / sizeof(typename Src::Elem);
  if (Src::kUnit < kLine && unit * Src::kUnit % kLine != 0) return;
  CK_UNROLL for (int i = 0; i < kTileRows; ++i) __builtin_prefetch(in[kTileRows + taps - 1 + i] + unit * Src::kUnit);
}

// kTileRows rows of the units [first, last). Only the first `rows` are stored.
template <class Src, class Filter, int kTileRows>
CK_INLINE void convolve_rows(const typename Src::Elem* const* in, typename Src::Elem* const* out, int rows,
                             const Filter& filter, int64_t taps, int64_t first, int64_t last,
                             const typename Src::C* bias, bool stream) {
  using C = typename Src::C;
  constexpr int P = Src::kParts;
  int64_t unit = first;
  if constexpr (Filter::kPerRow) {
    // A filter value is used for several vectors before it is fetched again.
    constexpr int kWide = kPositionVectors / P > 0 ? kPositionVectors / P : 1;
    for (; unit + kWide <= last; unit += kWide) {
      Tile<Src, Filter, kTileRows, kWide, 0, P> tile;
      tile.run(in, unit, filter, taps, bias);
      CK_UNROLL for (int u = 0; u < kWide; ++u) store_rows<Src, kTileRows>(
          out, rows, unit + u, stream, [&](int i) CK_INLINE_LAMBDA { return tile.sum[i] + u * P; });
    }
    if constexpr (kWide > 1) {
      for (; unit < last; ++unit) {
        Tile<Src, Filter, kTileRows, 1, 0, P> tile;
        tile.run(in, unit, filter, taps, bias);
        store_rows<Src, kTileRows>(out, rows, unit, stream, [&](int i) CK_INLINE_LAMBDA { return tile.sum[i]; });
      }
    }
  } else {
    // The parts of a unit one after the other: more rows fit into the registers, so that each row is loaded less often.
    for (; unit < last; ++unit) {
      if constexpr (kTileRows > 1) prefetch_rows<Src, kTileRows>(in, taps, unit);
      Tile<Src, Filter, kTileRows, 1, 0, 1> low;
      low.run(in, unit, filter, taps, bias);
      if constexpr (P == 1) {
        store_rows<Src, kTileRows>(out, rows, unit, stream, [&](int i) CK_INLINE_LAMBDA { return low.sum[i]; });
      } else {
        Tile<Src, Filter, kTileRows, 1, 1, 2> high;
        high.run(in, unit, filter, taps, bias);
        Vec<C> both[kTileRows][2];
        CK_UNROLL for (int i = 0; i < kTileRows; ++i) {
          both[i][0] = low.sum[i][0];
          both[i][1] = high.sum[i][0];
        }
        store_rows<Src, kTileRows>(out, rows, unit, stream, [&](int i) CK_INLINE_LAMBDA { return both[i]; });
      }
    }
  }
}

template <class Src, class Filter>
void Convolve<Src, Filter>::rows(const Elem* const* in, Elem* const* out, int64_t n, int64_t taps, int64_t units,
                                 int64_t units_per_head, const Filter& filter, const C* bias, bool stream) {
  constexpr int kTileRows = Filter::kPerRow ? kPositionRows : kRows;
  for (int64_t i = 0; i < n;) {
    const int rows = static_cast<int>(min(kTileRows, n - i));
    for (int64_t first = 0, head = 0; first < units; first += units_per_head, ++head) {
      const int64_t last = min(first + units_per_head, units);
      const Filter here = filter.at(i, head);
      if (rows == 1) {
        convolve_rows<Src, Filter, 1>(in + i, out + i, rows, here, taps, first, last, bias, stream);
      } else {
        convolve_rows<Src, Filter, kTileRows>(in + i, out + i, rows, here, taps, first, last, bias, stream);
      }
    }
    i += rows;
  }
}

// Compiles the convolution of rows that lie as Src says, with every kind of filter.
#define CK_INSTANTIATE_CONVOLVE(Src)                   \
  template struct Convolve<Src, SharedTaps<Src::C>>;   \
  template struct Convolve<Src, ChannelTaps<Src::C>>;  \
  template struct Convolve<Src, PositionTaps<Src::C>>; \
  template struct Convolve<Src, PositionChannelTaps<Src::C>>

}  // namespace ck::cpu::CK_ISA
