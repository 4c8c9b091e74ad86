// The register tiles of the convolution. Included only by the files that instantiate Convolve.
#pragma once

#include "csrc/cpu/conv/convolve.h"

namespace ck::cpu::CK_ISA {

// Whether a tile of filters that rows share takes both parts of a unit, and half the rows: each row is then loaded and
// split once. With few registers, or a filter value for each part, it would hold too few taps.
template <class Src, class Filter>
constexpr bool kTogether = Src::kParts == 2 && sizeof(typename Src::Elem) < sizeof(typename Src::C) &&
                           !Filter::kPerRow && !Filter::kPerChannel && kVectorBytes == 64;

// A register tile: kTileRows rows by the parts [kFirst, kLast) of kUnits units.
template <class Src, class Filter, int kTileRows, int kUnits, int kFirst, int kLast>
struct Tile {
  using C = typename Src::C;
  using Elem = typename Src::Elem;
  static constexpr int kWidth = kLast - kFirst;
  Vec<C> sum[kTileRows][kUnits * kWidth];

  CK_INLINE void load(const Elem* row, int64_t unit, Vec<C>* x) const {
    CK_UNROLL for (int u = 0; u < kUnits; ++u) {
      x[u * kWidth] = Src::template load<kFirst>(row, unit + u);
      if constexpr (kWidth == 2) x[u * kWidth + 1] = Src::template load<1>(row, unit + u);
    }
  }

  // kTaps taps of filters that rows share. Meanwhile asks for the unit of the rows `ahead`, if it is not null: for the
  // second-level cache, because rows at multiples of 1 KiB share a few sets of the first.
  template <int kTaps>
  CK_INLINE void add(const Elem* const* in, int64_t unit, const Filter& filter, int64_t k0,
                     const Elem* const* ahead = nullptr) {
    Vec<C> held[kTaps];
    CK_UNROLL for (int k = 0; k < kTaps; ++k) held[k] = filter.template value<Src::kParts, kFirst>(0, k0 + k, unit);
    CK_UNROLL for (int q = 0; q < kTileRows + kTaps - 1; ++q) {
      Vec<C> x[kUnits * kWidth];
      load(in[k0 + q], unit, x);
      if (q < kTileRows && ahead != nullptr) __builtin_prefetch(ahead[q] + unit * Src::kUnit, 0, 2);
      CK_UNROLL for (int k = 0; k < kTaps; ++k) {
        const int i = q - k;
        if (i < 0 || i >= kTileRows) continue;
        CK_UNROLL for (int u = 0; u < kUnits; ++u) {
          CK_UNROLL for (int p = 0; p < kWidth; ++p) sum[i][u * kWidth + p] += held[k] * x[u * kWidth + p];
        }
      }
    }
  }

  // Filters of each row: row r of the window meets tap r - i of the outputs [kBegin, kEnd).
  template <int kBegin, int kEnd>
  CK_INLINE void meet(const Elem* const* in, int64_t unit, const Filter& filter, int64_t r) {
    Vec<C> x[kUnits * kWidth];
    load(in[r], unit, x);
    CK_UNROLL for (int i = kBegin; i < kEnd; ++i) {
      CK_UNROLL for (int u = 0; u < kUnits; ++u) {
        CK_UNROLL for (int p = 0; p < kWidth; ++p) sum[i][u * kWidth + p] +=
            x[u * kWidth + p] * (p == 0 ? filter.template value<Src::kParts, kFirst>(i, r - i, unit + u)
                                        : filter.template value<Src::kParts, kLast - 1>(i, r - i, unit + u));
      }
    }
  }
  // Every row of the window once. kTaps is 0 where there are at least kTileRows taps: rows then meet the outputs from
  // the first on, all of them, and those up to the last.
  template <int kTaps, int... kRow>
  CK_INLINE void slide(const Elem* const* in, int64_t unit, const Filter& filter, int64_t taps,
                       std::integer_sequence<int, kRow...>) {
    if constexpr (kTaps > 0) {
      (meet<(kRow < kTaps ? 0 : kRow - kTaps + 1), (kRow < kTileRows ? kRow + 1 : kTileRows)>(in, unit, filter, kRow),
       ...);
    } else {
      (meet<0, kRow + 1>(in, unit, filter, kRow), ...);
      for (int64_t r = kTileRows - 1; r < taps; ++r) meet<0, kTileRows>(in, unit, filter, r);
      (meet<kRow + 1, kTileRows>(in, unit, filter, taps + kRow), ...);
    }
  }
  template <int kTaps>
  CK_INLINE void slide(const Elem* const* in, int64_t unit, const Filter& filter, int64_t taps) {
    slide<kTaps>(in, unit, filter, taps, std::make_integer_sequence<int, kTileRows - 1 + kTaps>());
  }

  CK_INLINE void run(const Elem* const* in, int64_t unit, const Filter& filter, int64_t taps, const C* bias,
                     const Elem* const* ahead = nullptr) {
    CK_UNROLL for (int i = 0; i < kTileRows; ++i) {
      CK_UNROLL for (int v = 0; v < kUnits * kWidth; ++v) {
        const int64_t vector = (unit + v / kWidth) * Src::kParts + kFirst + v % kWidth;
        sum[i][v] = bias != nullptr ? load_bytes<Vec<C>>(bias + vector * kLanes<C>) : Vec<C>{};
      }
    }
    if constexpr (Filter::kPerRow) {
      if (taps >= kTileRows) return slide<0>(in, unit, filter, taps);
      switch (taps) {
        case 3: return slide<3>(in, unit, filter, taps);
        case 2: return slide<2>(in, unit, filter, taps);
        case 1: return slide<1>(in, unit, filter, taps);
      }
    } else {
      int64_t k = 0;
      if constexpr (kWidth == Src::kParts) {
        if (taps < kTapGroup) return add_few(in, unit, filter, 0, taps, ahead);
        add<kTapGroup>(in, unit, filter, 0, ahead);
        k = kTapGroup;
      } else if (ahead != nullptr) {  // all at once: GCC spills sums of a tile that has a first group of its own
        CK_UNROLL for (int i = 0; i < kTileRows; ++i) __builtin_prefetch(ahead[i] + unit * Src::kUnit, 0, 2);
      }
      for (; k + kTapGroup <= taps; k += kTapGroup) add<kTapGroup>(in, unit, filter, k);
      add_few(in, unit, filter, k, taps - k);
    }
  }
  // Less than a group of taps.
  CK_INLINE void add_few(const Elem* const* in, int64_t unit, const Filter& filter, int64_t k0, int64_t taps,
                         const Elem* const* ahead = nullptr) {
    static_assert(kTapGroup == 4 || kTapGroup == 8);
    if constexpr (kTapGroup == 8) {
      switch (taps) {
        case 7: return add<7>(in, unit, filter, k0, ahead);
        case 6: return add<6>(in, unit, filter, k0, ahead);
        case 5: return add<5>(in, unit, filter, k0, ahead);
        case 4: return add<4>(in, unit, filter, k0, ahead);
      }
    }
    switch (taps) {
      case 3: return add<3>(in, unit, filter, k0, ahead);
      case 2: return add<2>(in, unit, filter, k0, ahead);
      case 1: return add<1>(in, unit, filter, k0, ahead);
    }
  }
};

// Stores the rows of a tile of kUnits units, row after row: `value(i)` gives the vectors of row i. All rows of a full
// tile go without a question.
template <class Src, int kTileRows, int kUnits = 1, class Value>
CK_INLINE void store_rows(typename Src::Elem* const* out, int rows, int64_t unit, bool stream, const Value& value) {
  const auto store = [&](int i, bool past) CK_INLINE_LAMBDA {
    CK_UNROLL for (int u = 0; u < kUnits; ++u) Src::store(out[i], unit + u, value(i) + u * Src::kParts, past);
  };
  if (rows == kTileRows && !stream) {
    CK_UNROLL for (int i = 0; i < kTileRows; ++i) store(i, false);
  } else {
    CK_UNROLL for (int i = 0; i < kTileRows; ++i) if (i < rows) store(i, stream);
  }
}

// The same of what an epilogue makes of the values. Kept apart, so that it takes no registers from tiles.
template <class Src, int kTileRows, int kUnits>
__attribute__((noinline)) void finish_rows(const Vec<typename Src::C> (*sums)[kUnits * Src::kParts],
                                           typename Src::Elem* const* out, int rows, int64_t unit, bool stream,
                                           const Epilogue<Src>& finish, int64_t first) {
  finish.from(first, 0).store(
      min(rows, kTileRows), kUnits, [&](int64_t i, int64_t u) CK_INLINE_LAMBDA { return sums[i] + u * Src::kParts; },
      out, unit, stream);
}

// Where the rows of a tile go: from row `first` of a block on, `rows` of them.
template <class Src>
struct Target {
  typename Src::Elem* const* out;
  int rows;
  bool stream;
  const Epilogue<Src>* finish;
  int64_t first;

  template <int kTileRows, int kUnits = 1>
  CK_INLINE void store(int64_t unit, const Vec<typename Src::C> (&sums)[kTileRows][kUnits * Src::kParts]) const {
    if (finish == nullptr) {
      store_rows<Src, kTileRows, kUnits>(out, rows, unit, stream, [&](int i) CK_INLINE_LAMBDA { return sums[i]; });
    } else {
      Vec<typename Src::C> copy[kTileRows][kUnits * Src::kParts];
      CK_UNROLL for (int i = 0; i < kTileRows; ++i) {
        CK_UNROLL for (int v = 0; v < kUnits * Src::kParts; ++v) copy[i][v] = sums[i][v];
      }
      finish_rows<Src, kTileRows, kUnits>(copy, out, rows, unit, stream, *finish, first);
    }
  }
};

// The rows that the next tile adds to the window, where a line of them begins with the unit.
template <class Src, int kTileRows>
CK_INLINE const typename Src::Elem* const* rows_ahead(const typename Src::Elem* const* in, int64_t taps, int64_t unit) {
  constexpr int kLine = 64 / sizeof(typename Src::Elem);
  const bool wanted = kTileRows > 1 && (Src::kUnit >= kLine || unit * Src::kUnit % kLine == 0);
  return wanted ? in + kTileRows + taps - 1 : nullptr;
}

// kTileRows rows of the units [first, last). Only those that the target has are stored.
template <class Src, class Filter, int kTileRows>
CK_INLINE void convolve_rows(const typename Src::Elem* const* in, const Target<Src>& target, const Filter& filter,
                             int64_t taps, int64_t first, int64_t last, const typename Src::C* bias) {
  using C = typename Src::C;
  constexpr int P = Src::kParts;
  int64_t unit = first;
  if constexpr (Filter::kPerRow) {
    // A filter value is used for several vectors before it is fetched again.
    constexpr int kWide = kPositionVectors / P > 0 ? kPositionVectors / P : 1;
    const auto units = [&]<int kUnits>() CK_INLINE_LAMBDA {
      for (; unit + kUnits <= last; unit += kUnits) {
        Tile<Src, Filter, kTileRows, kUnits, 0, P> tile;
        tile.run(in, unit, filter, taps, bias);
        target.template store<kTileRows, kUnits>(unit, tile.sum);
      }
    };
    units.template operator()<kWide>();
    if constexpr (kWide > 2) units.template operator()<2>();
    if constexpr (kWide > 1) units.template operator()<1>();
  } else if constexpr (P == 1 || kTogether<Src, Filter>) {
    for (; unit < last; ++unit) {
      Tile<Src, Filter, kTileRows, 1, 0, P> tile;
      tile.run(in, unit, filter, taps, bias, rows_ahead<Src, kTileRows>(in, taps, unit));
      target.template store<kTileRows>(unit, tile.sum);
    }
  } else {
    // The parts of a unit one after the other: more rows fit into the registers, so that each row is loaded less often.
    for (; unit < last; ++unit) {
      Tile<Src, Filter, kTileRows, 1, 0, 1> low;
      low.run(in, unit, filter, taps, bias, rows_ahead<Src, kTileRows>(in, taps, unit));
      Tile<Src, Filter, kTileRows, 1, 1, 2> high;
      high.run(in, unit, filter, taps, bias);
      Vec<C> both[kTileRows][2];
      CK_UNROLL for (int i = 0; i < kTileRows; ++i) {
        both[i][0] = low.sum[i][0];
        both[i][1] = high.sum[i][0];
      }
      target.template store<kTileRows>(unit, both);
    }
  }
}

template <class Src, class Filter>
void Convolve<Src, Filter>::rows(const Elem* const* in, Elem* const* out, int64_t n, int64_t taps, int64_t units,
                                 int64_t units_per_head, const Filter& filter, const C* bias, bool stream,
                                 const Epilogue<Src>* finish) {
  constexpr int kTileRows = Filter::kPerRow ? kPositionRows : kTogether<Src, Filter> ? kRows / 2 : kRows;
  const auto tile = [&](int64_t i, int64_t head) CK_INLINE_LAMBDA {
    const int rows = static_cast<int>(min(kTileRows, n - i));
    const int64_t first = head * units_per_head, last = min(first + units_per_head, units);
    const Filter here = filter.at(i, head);
    const Target<Src> target{out + i, rows, stream, finish, i};
    if (rows == 1) {
      convolve_rows<Src, Filter, 1>(in + i, target, here, taps, first, last, bias);
    } else {
      convolve_rows<Src, Filter, kTileRows>(in + i, target, here, taps, first, last, bias);
    }
  };
  const int64_t heads = ceil_div(units, units_per_head);
  if constexpr (Filter::kPerRow) {
    // Head after head: its rows stay in the first-level cache, from which every tile reads most of them again. A head
    // is too little of a row for the hardware's prefetch. With the longest vectors a tile is done too soon to ask for
    // more.
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t first = head * units_per_head, last = min(first + units_per_head, units);
      for (int64_t i = 0; i < n; i += kTileRows) {
        if constexpr (kVectorBytes < 64) {
          prefetch_rows<Src, kRead>(in + n + taps - 1 + i, kTileRows, first, last);
          prefetch_rows<Src, kWrite>(out + i, min(kTileRows, n - i), last, min(last + units_per_head, units));
        }
        tile(i, head);
      }
    }
  } else {
    for (int64_t i = 0; i < n; i += kTileRows)
      for (int64_t head = 0; head < heads; ++head) tile(i, head);
  }
}

// Compiles the convolution of rows that lie as Src says, with every kind of filter.
#define CK_INSTANTIATE_CONVOLVE(Src)                   \
  template struct Convolve<Src, SharedTaps<Src::C>>;   \
  template struct Convolve<Src, ChannelTaps<Src::C>>;  \
  template struct Convolve<Src, PositionTaps<Src::C>>; \
  template struct Convolve<Src, PositionChannelTaps<Src::C>>

}  // namespace ck::cpu::CK_ISA
