// Positions that lie next to each other, channel after channel, to and from rows of channels.
#pragma once

#include "csrc/cpu/conv/converted.h"

namespace ck::cpu::CK_ISA {

// The elements of a unit as they are stored, in natural order.
template <class T>
struct RawOf {
  using Element = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  typedef Element type __attribute__((vector_size(Lanes<T>::kUnit * sizeof(T))));
};
template <class T>
using Raw = typename RawOf<T>::type;

template <class T, int kPart>
CK_INLINE Vec<Compute<T>> widen(Raw<T> raw) {
  return Lanes<T>::template load<kPart>(reinterpret_cast<const T*>(&raw), 0);
}

// Calls a function with 0, ..., kCount - 1 that are known when it is compiled.
template <int kCount, class F>
CK_INLINE void each(const F& f) {
  [&]<int... k>(std::integer_sequence<int, k...>)
      CK_INLINE_LAMBDA { (f(std::integral_constant<int, k>()), ...); }(std::make_integer_sequence<int, kCount>());
}

// A unit of channels with kWidth positions each: so few that its elements are exchanged between the vectors of memory.
template <class T, int kWidth>
class CloseUnit {
 public:
  static constexpr int kUnit = Lanes<T>::kUnit;

  CK_INLINE void load(const T* from) {
    CK_UNROLL for (int k = 0; k < kWidth; ++k) memory_[k] = load_bytes<Raw<T>>(from + k * kUnit);
  }
  CK_INLINE void store(T* to) const {
    CK_UNROLL for (int k = 0; k < kWidth; ++k) store_bytes(to + k * kUnit, memory_[k]);
  }

  template <int kPosition>
  CK_INLINE Raw<T> row() const {
    // From the first two vectors, and then from one more after the other.
    Raw<T> row = exchange(memory_[0], memory_[1], [](int lane) {
      const int element = lane * kWidth + kPosition;
      return element < 2 * kUnit ? element : lane;
    });
    each<kWidth - 2>([&](auto rest) CK_INLINE_LAMBDA {
      constexpr int piece = rest.value + 2;
      row = exchange(row, memory_[piece], [](int lane) {
        const int element = lane * kWidth + kPosition;
        return element / kUnit == piece ? kUnit + element % kUnit : lane;
      });
    });
    return row;
  }
  template <int kPosition>
  CK_INLINE void place(Raw<T> row) {
    each<kWidth>([&](auto constant) CK_INLINE_LAMBDA {
      constexpr int piece = constant.value;
      memory_[piece] = exchange(memory_[piece], row, [](int lane) {
        const int element = piece * kUnit + lane;
        return element % kWidth == kPosition ? kUnit + element / kWidth : lane;
      });
    });
  }
  // Every position to where the one before it was. The last keep what is to be replaced.
  CK_INLINE void shift() {
    CK_UNROLL for (int k = 0; k < kWidth; ++k) memory_[k] =
        exchange(memory_[k], memory_[k + 1 < kWidth ? k + 1 : k], [](int lane) { return lane + 1; });
  }

 private:
  // Lane i is lane index(i) of two vectors.
  template <class Index>
  static CK_INLINE Raw<T> exchange(Raw<T> a, Raw<T> b, Index) {
    return [&]<int... kLane>(std::integer_sequence<int, kLane...>) CK_INLINE_LAMBDA {
      return __builtin_shuffle(a, b, Raw<T>{static_cast<typename RawOf<T>::Element>(Index()(kLane))...});
    }(std::make_integer_sequence<int, kUnit>());
  }

  Raw<T> memory_[kWidth];
};

// Whether vectors exchange their elements for so many positions. With the shortest ones most exchanges have no
// instruction.
CK_INLINE bool exchanged(int64_t width) { return kVectorBytes > 16 && width >= 2 && width <= 8; }

// Calls a function with such a width that is known when it is compiled.
template <class F>
CK_INLINE void with_width(int64_t width, const F& f) {
  switch (width) {
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
    case 5: return f(std::integral_constant<int, 5>());
    case 6: return f(std::integral_constant<int, 6>());
    case 7: return f(std::integral_constant<int, 7>());
    case 8: return f(std::integral_constant<int, 8>());
  }
}

// Rows of T as they are stored, for load_squares and store_squares.
template <class T>
struct StoredRows {
  using Elem = T;
  using Lane = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  using Memory = typename RawOf<T>::Element;
  typedef Memory Packed __attribute__((vector_size(kLanes<Lane> * sizeof(T))));
  static constexpr int kParts = 1, kUnit = kLanes<Lane>;
  static constexpr int channel(int, int lane) { return lane; }

  static CK_INLINE Vec<Lane> load(const T* p, int64_t n) {
    Packed v = {};
    if (n >= kUnit)
      v = load_bytes<Packed>(p);
    else
      memcpy(static_cast<void*>(&v), p, static_cast<size_t>(n) * sizeof(T));
    return __builtin_convertvector(v, Vec<Lane>);
  }
  static CK_INLINE void store(T* p, Vec<Lane> v, int64_t n) {
    const Packed packed = __builtin_convertvector(v, Packed);
    if (n >= kUnit)
      store_bytes(p, packed);
    else
      memcpy(static_cast<void*>(p), &packed, static_cast<size_t>(n) * sizeof(T));
  }
  static CK_INLINE Vec<Lane> load_row(const T* row, int64_t vector) { return load(row + vector * kUnit, kUnit); }
  static CK_INLINE void store_row(T* row, int64_t vector, Vec<Lane> v) { store(row + vector * kUnit, v, kUnit); }
};

// The same of rows that are converted.
template <class T>
struct ConvertedRows {
  using Elem = Compute<T>;
  using Lane = Compute<T>;
  static constexpr int kParts = Lanes<T>::kParts, kUnit = Lanes<T>::kUnit;
  static constexpr int channel(int part, int lane) { return Lanes<T>::channel(part, lane); }

  static CK_INLINE Vec<Lane> load(const T* p, int64_t n) { return load_natural(p, p + n); }
  static CK_INLINE void store(T* p, Vec<Lane> v, int64_t n) { store_natural(p, v, n); }
  static CK_INLINE Vec<Lane> load_row(const Lane* row, int64_t vector) {
    return load_bytes<Vec<Lane>>(row + vector * kLanes<Lane>);
  }
  static CK_INLINE void store_row(Lane* row, int64_t vector, Vec<Lane> v) {
    store_bytes(row + vector * kLanes<Lane>, v);
  }
};

// n positions of so many channels, `stride` apart, to rows that lie `pitch` apart, transposed in squares of vectors.
template <class T, class Form>
inline void load_squares(const T* from, int64_t stride, int64_t n, int64_t channels, typename Form::Elem* rows,
                         int64_t pitch) {
  using Lane = typename Form::Lane;
  constexpr int P = Form::kParts, V = kLanes<Lane>, U = Form::kUnit;
  for (int64_t unit = 0; unit * U < channels; ++unit) {
    for (int part = 0; part < P; ++part) {
      for (int64_t t = 0; t < n; t += V) {
        Vec<Lane> square[V];
        for (int lane = 0; lane < V; ++lane) {
          const int64_t c = unit * U + Form::channel(part, lane);
          square[lane] = c < channels ? Form::load(from + c * stride + t, n - t) : Vec<Lane>{};
        }
        transpose<Lane>(square);
        for (int64_t i = 0; i < min(V, n - t); ++i) Form::store_row(rows + (t + i) * pitch, unit * P + part, square[i]);
      }
    }
  }
}
// The inverse.
template <class T, class Form>
inline void store_squares(const typename Form::Elem* rows, int64_t pitch, int64_t n, int64_t channels, T* to,
                          int64_t stride) {
  using Lane = typename Form::Lane;
  constexpr int P = Form::kParts, V = kLanes<Lane>, U = Form::kUnit;
  for (int64_t unit = 0; unit * U < channels; ++unit) {
    for (int part = 0; part < P; ++part) {
      for (int64_t t = 0; t < n; t += V) {
        Vec<Lane> square[V] = {};
        for (int64_t i = 0; i < min(V, n - t); ++i) square[i] = Form::load_row(rows + (t + i) * pitch, unit * P + part);
        transpose<Lane>(square);
        for (int lane = 0; lane < V; ++lane) {
          const int64_t c = unit * U + Form::channel(part, lane);
          if (c < channels) Form::store(to + c * stride + t, square[lane], n - t);
        }
      }
    }
  }
}

// n <= kWidth positions to converted rows.
template <class T, int kWidth>
inline void load_close(const T* from, int64_t n, int64_t channels, Compute<T>* rows, int64_t pitch) {
  constexpr int P = Lanes<T>::kParts, U = Lanes<T>::kUnit, V = kLanes<Compute<T>>;
  for (int64_t c = 0; c < channels; c += U) {
    // What lies behind the last position is not touched.
    const int64_t rest = (channels - c - 1) * kWidth + n;
    T copy[kWidth * U];
    const T* memory = from + c * kWidth;
    if (rest < kWidth * U) {
      memset(static_cast<void*>(copy), 0, sizeof copy);
      memcpy(static_cast<void*>(copy), memory, static_cast<size_t>(rest) * sizeof(T));
      memory = copy;
    }
    CloseUnit<T, kWidth> unit;
    unit.load(memory);
    each<kWidth>([&](auto i) CK_INLINE_LAMBDA {
      if (i.value >= n) return;
      const Raw<T> row = unit.template row<i.value>();
      Compute<T>* const to = rows + i.value * pitch + c / U * P * V;
      store_bytes(to, widen<T, 0>(row));
      if constexpr (P == 2) store_bytes(to + V, widen<T, 1>(row));
    });
  }
}

// n positions of the channels of a block, from its first, to converted rows, and back.
template <class T>
inline void load_transposed(const T* from, int64_t stride, int64_t n, const ChannelBlock& block, Compute<T>* rows) {
  const int64_t pitch = vector_width<T>(block);
  if (n > stride || !exchanged(stride))
    return load_squares<T, ConvertedRows<T>>(from, stride, n, block.size(), rows, pitch);
  with_width(stride, [&](auto width) { load_close<T, width.value>(from, n, block.size(), rows, pitch); });
}
template <class T>
inline void store_transposed(const Compute<T>* rows, int64_t n, const ChannelBlock& block, T* to, int64_t stride) {
  store_squares<T, ConvertedRows<T>>(rows, vector_width<T>(block), n, block.size(), to, stride);
}

// How far apart rows lie that are stored in whole vectors.
template <class T>
inline int64_t row_pitch(const ChannelBlock& block) {
  return round_up(block.size(), max(Lanes<T>::kUnit, StoredRows<T>::kUnit));
}

// Positions [first, last) of `width` to rows as they are stored.
template <class T>
inline void gather(const T* from, int64_t stride, int64_t width, int64_t first, int64_t last, int64_t channels, T* rows,
                   int64_t pitch) {
  if (stride != width || !exchanged(width)) {
    T* const to = rows + first * pitch;
    return load_squares<T, StoredRows<T>>(from + first, stride, last - first, channels, to, pitch);
  }
  with_width(width, [&](auto constant) {
    constexpr int kWidth = constant.value, U = Lanes<T>::kUnit;
    int64_t c = 0;
    for (; c + U <= channels; c += U) {
      CloseUnit<T, kWidth> unit;
      unit.load(from + c * kWidth);
      each<kWidth>([&](auto w) CK_INLINE_LAMBDA {
        if (w.value >= first && w.value < last) store_bytes(rows + w.value * pitch + c, unit.template row<w.value>());
      });
    }
    for (; c < channels; ++c)
      for (int64_t w = first; w < last; ++w) rows[w * pitch + c] = from[c * kWidth + w];
  });
}
// Rows become the positions from `first` on.
template <class T>
inline void scatter(const T* rows, int64_t pitch, int64_t width, int64_t first, int64_t channels, T* to,
                    int64_t stride) {
  if (stride != width || !exchanged(width)) {
    const T* const from = rows + first * pitch;
    return store_squares<T, StoredRows<T>>(from, pitch, width - first, channels, to + first, stride);
  }
  with_width(width, [&](auto constant) {
    constexpr int kWidth = constant.value, U = Lanes<T>::kUnit;
    int64_t c = 0;
    for (; c + U <= channels; c += U) {
      CloseUnit<T, kWidth> unit;
      unit.load(to + c * kWidth);
      each<kWidth>([&](auto w) CK_INLINE_LAMBDA {
        if (w.value >= first) unit.template place<w.value>(load_bytes<Raw<T>>(rows + w.value * pitch + c));
      });
      unit.store(to + c * kWidth);
    }
    for (; c < channels; ++c)
      for (int64_t w = first; w < width; ++w) to[c * kWidth + w] = rows[w * pitch + c];
  });
}

}  // namespace ck::cpu::CK_ISA
