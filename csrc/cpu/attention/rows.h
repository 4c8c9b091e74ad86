// Rows of attention in the compute type: conversion from and to tensors, and arithmetic on them.
#pragma once

#include "csrc/cpu/attention/multiply.h"
#include "csrc/cpu/attention/problem.h"
#include "csrc/cpu/lanes.h"

namespace ck::cpu::CK_ISA {

// n values of any type and stride, times `factor`, one after the other; then zeros up to a whole vector.
template <class C>
inline void convert_in(Dtype dtype, const void* data, int64_t at, int64_t stride, int64_t n, C factor, C* out) {
  constexpr int V = kLanes<C>;
  with_dtype(dtype, [&](auto* tag) {
    using T = __typeof__(*tag);
    if constexpr (std::is_same_v<Compute<T>, C>) {
      const T* const from = static_cast<const T*>(data) + at;
      if (stride == 1) {
        for (int64_t i = 0; i < n; i += V) store_bytes(out + i, load_natural(from + i, from + n) * factor);
      } else {
        for (int64_t i = 0; i < n; ++i) out[i] = to_float(from[i * stride]) * factor;
        for (int64_t i = n; i % V != 0; ++i) out[i] = 0;
      }
    }
  });
}

// The inverse: n values of the compute type to any type and stride.
template <class C>
inline void convert_out(Dtype dtype, const C* from, int64_t n, void* data, int64_t at, int64_t stride) {
  constexpr int V = kLanes<C>;
  with_dtype(dtype, [&](auto* tag) {
    using T = __typeof__(*tag);
    if constexpr (std::is_same_v<Compute<T>, C>) {
      T* const out = static_cast<T*>(data) + at;
      if (stride == 1) {
        for (int64_t i = 0; i < n; i += V) store_natural(out + i, load_bytes<Vec<C>>(from + i), n - i);
      } else {
        for (int64_t i = 0; i < n; ++i) from_float(from[i], out[i * stride]);
      }
    }
  });
}

template <class C>
inline void read_row(const Attention& p, const HeadRows& t, int64_t b, int64_t i, int64_t h, int64_t n, C factor,
                     C* out) {
  convert_in(p.dtype, t.data, b * t.batch + i * t.time + h * t.head, t.channel, n, factor, out);
}

// Asks for a row ahead of its use: rows of one head may lie far apart, where no hardware looks for the next one.
CK_INLINE void prefetch_row(const Attention& p, const HeadRows& t, int64_t b, int64_t i, int64_t h, int64_t n) {
  const int64_t size = size_of(p.dtype);
  const char* const row = static_cast<const char*>(t.data) + (b * t.batch + i * t.time + h * t.head) * size;
  for (int64_t at = 0; at < n * size; at += 64) __builtin_prefetch(row + at);
}

template <class C>
inline void write_row(const Attention& p, const HeadRows& t, int64_t b, int64_t i, int64_t h, int64_t n,
                      const C* from) {
  convert_out(p.dtype, from, n, t.data, b * t.batch + i * t.time + h * t.head, t.channel);
}

template <class C>
inline C& scalar(const HeadScalars& t, int64_t b, int64_t h, int64_t i) {
  return static_cast<C*>(t.data)[b * t.batch + h * t.head + i * t.time];
}

template <class C>
CK_INLINE void clear(C* data, int64_t n) {
  memset(static_cast<void*>(data), 0, static_cast<size_t>(n) * sizeof(C));
}

// to[0 .. n) += from[0 .. n) * factor
template <class C>
CK_INLINE void add_to(C* to, const C* from, int64_t n, C factor = 1) {
  constexpr int V = kLanes<C>;
  int64_t i = 0;
  for (; i + V <= n; i += V) store_bytes(to + i, load_bytes<Vec<C>>(to + i) + load_bytes<Vec<C>>(from + i) * factor);
  for (; i < n; ++i) to[i] += from[i] * factor;
}

// Lanes from .. to of v, the others of `rest`.
template <class C>
CK_INLINE Vec<C> select_lanes(int64_t from, int64_t to, Vec<C> v, Vec<C> rest) {
  using I = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;
  Vec<I> lane = {};
  for (int l = 0; l < kLanes<C>; ++l) lane[l] = l;
  return (lane >= static_cast<I>(from)) & (lane < static_cast<I>(to)) ? v : rest;
}

// Replaces elements from .. to of a row by f of them; reads and writes whole vectors.
template <class C, class F>
CK_INLINE void change(C* row, int64_t from, int64_t to, const F& f) {
  constexpr int V = kLanes<C>;
  if (from >= to) return;
  for (int64_t j = from / V * V; j < to; j += V) {
    const Vec<C> v = load_bytes<Vec<C>>(row + j);
    store_bytes(row + j, select_lanes<C>(from - j, to - j, f(v), v));
  }
}

template <class C>
CK_INLINE C sum(const C* row, int64_t n) {
  constexpr int V = kLanes<C>;
  Vec<C> lanes = {};
  int64_t i = 0;
  for (; i + V <= n; i += V) lanes += load_bytes<Vec<C>>(row + i);
  C total = sum_lanes<C>(lanes);
  for (; i < n; ++i) total += row[i];
  return total;
}

// Whether a row, of whole vectors, holds no NaN and no infinity.
template <class C>
CK_INLINE bool is_finite(const C* row, int64_t width) {
  Vec<C> sum = {};
  for (int64_t i = 0; i < width; i += kLanes<C>) sum += load_bytes<Vec<C>>(row + i) * C{0};
  return sum_lanes<C>(sum) == C{0};
}

// Whether a row, of whole vectors, holds elements other than 0 below a limit.
template <class C>
CK_INLINE bool is_tiny(const C* row, int64_t width, C limit) {
  bool tiny = false;
  for (int64_t i = 0; i < width; ++i) tiny = tiny || (row[i] != C{0} && row[i] < limit && -row[i] < limit);
  return tiny;
}

template <class C>
CK_INLINE C dot(const C* a, const C* b, int64_t n) {
  constexpr int V = kLanes<C>;
  Vec<C> sum = {};
  int64_t i = 0;
  for (; i + V <= n; i += V) sum += load_bytes<Vec<C>>(a + i) * load_bytes<Vec<C>>(b + i);
  C total = sum_lanes<C>(sum);
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

// Squares of the lengths of n rows, of whole vectors. Whole vectors are written.
template <class C>
inline void squared_lengths(const C* rows, int64_t n, int64_t pitch, int64_t width, C* out) {
  constexpr int V = kLanes<C>;
  for (int64_t r = 0; r < n; r += V) {
    Vec<C> squares[V];
    CK_UNROLL for (int i = 0; i < V; ++i) {
      const C* const row = rows + min(r + i, n - 1) * pitch;
      squares[i] = Vec<C>{};
      for (int64_t d = 0; d < width; d += V) squares[i] += load_bytes<Vec<C>>(row + d) * load_bytes<Vec<C>>(row + d);
    }
    store_bytes(out + r, sum_each<C>(squares));
  }
}

// What is not a finite number becomes infinity.
template <class C>
CK_INLINE Vec<C> or_infinity(Vec<C> v) {
  const Vec<C> infinity = splat(static_cast<C>(__builtin_inf()));
  return v < infinity ? v : infinity;
}

// The maximum of n elements and 0.
template <class C>
CK_INLINE C largest_of(const C* row, int64_t n) {
  constexpr int V = kLanes<C>;
  C top = 0;
  int64_t i = 0;
  if (n >= V) {
    Vec<C> lanes = {};
    for (; i + V <= n; i += V) lanes = vmax<C>(lanes, load_bytes<Vec<C>>(row + i));
    top = max_lanes<C>(lanes);
  }
  for (; i < n; ++i) top = row[i] > top ? row[i] : top;
  return top;
}

template <class C>
CK_INLINE void multiply_by(C* data, int64_t width, C factor) {
  for (int64_t i = 0; i < width; i += kLanes<C>) store_bytes(data + i, load_bytes<Vec<C>>(data + i) * factor);
}

inline bool any(const bool* flags, int64_t n) { return memchr(flags, 1, static_cast<size_t>(n)) != nullptr; }

// The rows with zeros in place of those that are not finite, copied to `clean`; `rows` itself if all are finite.
template <class C>
inline const C* without_nonfinite(int64_t n, const C* rows, int64_t pitch, const bool* nonfinite, C* clean) {
  if (!any(nonfinite, n)) return rows;
  memcpy(static_cast<void*>(clean), rows, static_cast<size_t>(n * pitch) * sizeof(C));
  for (int64_t i = 0; i < n; ++i)
    if (nonfinite[i]) clear(clean + i * pitch, pitch);
  return clean;
}

// c[r] += sum over k of a[r][k] * b[k], rows of `width` and `pitch`, where a is 0 unless sees(r, k). Rows of b that are
// not finite are added one by one, to the rows of c that see them. clean: scratch for b.
template <class C, class Sees>
inline void multiply_visible(int64_t rows, int64_t width, int64_t depth, Factor<C> a, const C* b, int64_t pitch,
                             const bool* nonfinite, C* clean, C* c, const Sees& sees) {
  const C* const finite = without_nonfinite(depth, b, pitch, nonfinite, clean);
  multiply<true>(rows, width, depth, a, {finite, pitch}, Vectors<C>{c, pitch});
  for (int64_t k = 0; finite != b && k < depth; ++k)
    for (int64_t r = 0; nonfinite[k] && r < rows; ++r)
      if (sees(r, k)) add_to(c + r * pitch, b + k * pitch, width, a.data[r * a.row + k * a.step]);
}

// c[r] += sum over k of a[k][r] * b[k], as in the gradients of tables. Rows of a that are not finite are added one by
// one, where b is not 0.
template <class C>
inline void multiply_transposed(int64_t rows, int64_t columns, int64_t depth, const C* a, int64_t a_row,
                                const bool* nonfinite, C* clean, const C* b, int64_t b_row, Vectors<C> c) {
  const C* const finite = without_nonfinite(depth, a, a_row, nonfinite, clean);
  multiply<true>(rows, columns, depth, Factor<C>{finite, 1, a_row}, {b, b_row}, c);
  for (int64_t k = 0; finite != a && k < depth; ++k)
    for (int64_t r = 0; nonfinite[k] && r < rows; ++r)
      for (int64_t i = 0; i < columns; ++i)
        if (b[k * b_row + i] != C{0})
          c.from(r, i / kLanes<C>).data[i % kLanes<C>] += a[k * a_row + r] * b[k * b_row + i];
}

}  // namespace ck::cpu::CK_ISA
