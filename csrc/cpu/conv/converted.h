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

}  // namespace ck::cpu::CK_ISA
