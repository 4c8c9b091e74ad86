// One matrix product for all of attention: c[r][v] (+)= sum over k of a[r][k] * b[k][v].
//
// Rows of b and c hold whole vectors, which need not be neighbours; a has any strides, so that either factor of a
// product may be transposed. Every element is summed in the order of k.
#pragma once

#include "csrc/cpu/simd.h"

namespace ck::cpu::CK_ISA {

// a[r * row + k * step]
template <class C>
struct Factor {
  const C* data;
  int64_t row, step;
};

// Vector v of row r is at data + r * row + v * step.
template <class C>
struct Vectors {
  C* data;
  int64_t row, step = kLanes<std::remove_const_t<C>>;

  Vectors from(int64_t r, int64_t v) const { return {data + r * row + v * step, row, step}; }
};

// Accumulators in registers: 16 of 32 vectors with AVX-512, 12 of 16 otherwise, where a row of b and one element of a
// take the rest.
constexpr int kTileRows = kVectorBytes == 64 ? 8 : 6;

template <class C, int kRows, int kVectors, bool kAdd>
CK_INLINE void multiply_tile(Factor<C> a, Vectors<const C> b, int64_t depth, Vectors<C> c) {
  Vec<C> sum[kRows][kVectors];
  CK_UNROLL for (int r = 0; r < kRows; ++r) {
    CK_UNROLL for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = Vec<C>{};
      if constexpr (kAdd) sum[r][v] = load_bytes<Vec<C>>(c.data + r * c.row + v * c.step);
    }
  }
  // Two pointers into a: with one, GCC has too few registers for the distances of so many rows.
  constexpr int kUpper = (kRows + 1) / 2;
  const C *upper = a.data, *lower = a.data + kUpper * a.row;
  asm("" : "+r"(lower));
  for (int64_t k = 0; k < depth; ++k, upper += a.step, lower += a.step) {
    Vec<C> right[kVectors];
    CK_UNROLL for (int v = 0; v < kVectors; ++v) right[v] = load_bytes<Vec<C>>(b.data + k * b.row + v * b.step);
    CK_UNROLL for (int r = 0; r < kRows; ++r) {
      const Vec<C> left = splat(r < kUpper ? upper[r * a.row] : lower[(r - kUpper) * a.row]);
      CK_UNROLL for (int v = 0; v < kVectors; ++v) sum[r][v] += left * right[v];
    }
  }
  CK_UNROLL for (int r = 0; r < kRows; ++r) {
    CK_UNROLL for (int v = 0; v < kVectors; ++v) store_bytes(c.data + r * c.row + v * c.step, sum[r][v]);
  }
}

// As many rows as fill tiles, then one lower tile.
template <class C, int kRows, int kVectors, bool kAdd>
__attribute__((noinline)) void multiply_rows(int64_t rows, Factor<C> a, Vectors<const C> b, int64_t depth,
                                             Vectors<C> c) {
  for (; rows >= kRows; rows -= kRows) {
    multiply_tile<C, kRows, kVectors, kAdd>(a, b, depth, c);
    a.data += kRows * a.row;
    c = c.from(kRows, 0);
  }
  if constexpr (kRows > 1) {
    if (rows > 0) multiply_rows<C, kRows - 1, kVectors, kAdd>(rows, a, b, depth, c);
  }
}

// kAdd: to what c holds. `columns` are whole vectors.
template <bool kAdd, class C>
inline void multiply(int64_t rows, int64_t columns, int64_t depth, Factor<C> a, Vectors<const C> b, Vectors<C> c) {
  const int64_t vectors = columns / kLanes<C>;
  int64_t v = 0;
  for (; v + 2 <= vectors; v += 2) multiply_rows<C, kTileRows, 2, kAdd>(rows, a, b.from(0, v), depth, c.from(0, v));
  if (v < vectors) multiply_rows<C, kTileRows, 1, kAdd>(rows, a, b.from(0, v), depth, c.from(0, v));
}

}  // namespace ck::cpu::CK_ISA
