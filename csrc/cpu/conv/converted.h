// Channels of a row as tiles read them: converted to the type that is computed with, from any strides, and back.
#pragma once

#include "csrc/common/conv.h"
#include "csrc/cpu/lanes.h"
#include "csrc/cpu/parallel.h"

namespace ck::cpu::CK_ISA {

// The layout of converted rows. Where conversion changes nothing it is the storage layout itself.
template <class T>
using Staged = std::conditional_t<Lanes<T>::kParts == 1, Lanes<Compute<T>>, Converted<T>>;

// Whether tiles read the storage type themselves. Where converting takes many instructions each row is converted once.
template <class T>
constexpr bool kReadInPlace = kVectorBytes > 16 || sizeof(T) == sizeof(Compute<T>);

// Channels [first, last) that one task works on, and the whole units that cover them.
struct ChannelBlock {
  int64_t first, last;
  bool staged;  // rows are converted to a padded buffer instead of being read and written in place

  int64_t size() const { return last - first; }
};

template <class T>
CK_INLINE int64_t units_of(const ChannelBlock& block) {
  return ceil_div(block.size(), Lanes<T>::kUnit);
}
template <class T>
CK_INLINE int64_t vector_width(const ChannelBlock& block) {  // elements of a converted row
  return units_of<T>(block) * Lanes<T>::kParts * kLanes<Compute<T>>;
}

// Where channel c of a block stands in a converted row.
template <class L>
CK_INLINE int64_t vector_position(int64_t c) {
  if constexpr (L::kParts == 1) return c;
  const int64_t inside = c % L::kUnit;
  return c - inside + inside % 2 * kLanes<typename L::C> + inside / 2;
}

// Loads one unit of a strided row with n valid channels (the rest reads as 0).
template <class T>
CK_INLINE void load_unit(const T* row, int64_t stride, int64_t n, Vec<Compute<T>>* out) {
  T copy[Lanes<T>::kUnit];
  if (n < Lanes<T>::kUnit || stride != 1) {
    memset(static_cast<void*>(copy), 0, sizeof copy);
    for (int64_t i = 0; i < min(n, Lanes<T>::kUnit); ++i) copy[i] = row[i * stride];
    row = copy;
  }
  out[0] = Lanes<T>::template load<0>(row, 0);
  if constexpr (Lanes<T>::kParts == 2) out[1] = Lanes<T>::template load<1>(row, 0);
}

template <class T>
CK_INLINE void store_unit(T* row, int64_t stride, int64_t n, const Vec<Compute<T>>* v) {
  if (n >= Lanes<T>::kUnit && stride == 1) return Lanes<T>::store(row, 0, v, false);
  T copy[Lanes<T>::kUnit];
  Lanes<T>::store(copy, 0, v, false);
  for (int64_t i = 0; i < min(n, Lanes<T>::kUnit); ++i) row[i * stride] = copy[i];
}

// Whether the positions of a tensor lie next to each other and its channels do not.
CK_INLINE bool channels_first(const Rows& r) { return r.time == 1 && r.channel != 1; }

// Channels that lie so close together that few vectors of memory hold those of a vector: what is between them is read
// too, and each converted vector picks its elements from every vector of memory.
// n <= kStride positions from `from` (first channel of the block) to n converted rows.
template <class T, int kStride>
inline void load_close(const T* from, int64_t n, const ChannelBlock& block, Compute<T>* out) {
  using C = Compute<T>;
  using Lane = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;
  constexpr int P = Lanes<T>::kParts, V = kLanes<C>, U = Lanes<T>::kUnit, kPieces = P * kStride;
  const int64_t width = vector_width<T>(block);
  const T* const limit = from + (block.size() - 1) * kStride + n;
  Vec<Lane> same, pick[kPieces][kPieces];  // [row and part][piece]
  for (int lane = 0; lane < V; ++lane) same[lane] = static_cast<Lane>(lane);
  for (int i = 0; i < n * P; ++i) {
    Vec<Lane> element;
    for (int lane = 0; lane < V; ++lane)
      element[lane] = static_cast<Lane>(Lanes<T>::channel(i % P, lane) * kStride + i / P);
    for (int k = 0; k < kPieces; ++k, element -= static_cast<Lane>(V))
      pick[i][k] = (element >= Lane{0}) & (element < static_cast<Lane>(V)) ? element + static_cast<Lane>(V) : same;
  }
  for (int64_t unit = 0; unit < units_of<T>(block); ++unit) {
    Vec<C> piece[kPieces];
    CK_UNROLL for (int k = 0; k < kPieces; ++k) {
      const T* const at = from + unit * U * kStride + k * V;
      piece[k] = at < limit ? load_natural(at, limit) : Vec<C>{};
    }
    for (int i = 0; i < n * P; ++i) {
      Vec<C> row = {};
      CK_UNROLL for (int k = 0; k < kPieces; ++k) row = __builtin_shuffle(row, piece[k], pick[i][k]);
      store_bytes(out + i / P * width + (unit * P + i % P) * V, row);
    }
  }
}

// Tensors whose positions, not channels, lie next to each other ([batch, channels, time] memory) are transposed in
// squares of vectors: n positions from `from` (first channel of the block, `stride` between channels) to n converted
// rows.
template <class T>
inline void load_transposed(const T* from, int64_t stride, int64_t n, const ChannelBlock& block, Compute<T>* out) {
  constexpr int P = Lanes<T>::kParts, V = kLanes<Compute<T>>, U = Lanes<T>::kUnit;
  if (kVectorBytes > 16 && n <= stride) {
    switch (stride) {
      case 2: return load_close<T, 2>(from, n, block, out);
      case 3: return load_close<T, 3>(from, n, block, out);
      case 4: return load_close<T, 4>(from, n, block, out);
      case 5: return load_close<T, 5>(from, n, block, out);
      case 6: return load_close<T, 6>(from, n, block, out);
      case 7: return load_close<T, 7>(from, n, block, out);
      case 8: return load_close<T, 8>(from, n, block, out);
      default: break;
    }
  }
  const int64_t width = vector_width<T>(block);
  for (int64_t unit = 0; unit < units_of<T>(block); ++unit) {
    for (int part = 0; part < P; ++part) {
      for (int64_t t = 0; t < n; t += V) {
        Vec<Compute<T>> square[V];
        for (int lane = 0; lane < V; ++lane) {
          const int64_t c = unit * U + Lanes<T>::channel(part, lane);
          square[lane] =
              c < block.size() ? load_natural(from + c * stride + t, from + c * stride + n) : Vec<Compute<T>>{};
        }
        transpose<Compute<T>>(square);
        for (int64_t i = 0; i < min(V, n - t); ++i)
          store_bytes(out + (t + i) * width + (unit * P + part) * V, square[i]);
      }
    }
  }
}

// The inverse: n converted rows to n positions of each channel.
template <class T>
inline void store_transposed(const Compute<T>* rows, int64_t n, const ChannelBlock& block, T* to, int64_t stride) {
  constexpr int P = Lanes<T>::kParts, V = kLanes<Compute<T>>, U = Lanes<T>::kUnit;
  const int64_t width = vector_width<T>(block);
  for (int64_t unit = 0; unit < units_of<T>(block); ++unit) {
    for (int part = 0; part < P; ++part) {
      for (int64_t t = 0; t < n; t += V) {
        const int64_t count = min(V, n - t);
        Vec<Compute<T>> square[V] = {};
        for (int64_t i = 0; i < count; ++i)
          square[i] = load_bytes<Vec<Compute<T>>>(rows + (t + i) * width + (unit * P + part) * V);
        transpose<Compute<T>>(square);
        for (int lane = 0; lane < V; ++lane) {
          const int64_t c = unit * U + Lanes<T>::channel(part, lane);
          if (c < block.size()) store_natural(to + c * stride + t, square[lane], count);
        }
      }
    }
  }
}

}  // namespace ck::cpu::CK_ISA
