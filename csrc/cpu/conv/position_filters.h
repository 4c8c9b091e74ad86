// From weights to filters that depend on the position, and the gradients of both, for many positions at once.
//
// A table of filters holds positions side by side: element j * pitch + i is tap j % taps of head h0 + j / taps at
// position i. Softmax over taps then goes down the table for a vector of positions, and no vector is summed across its
// lanes.
#pragma once

#include "csrc/cpu/conv/filters.h"

namespace ck::cpu::CK_ISA {

// n positions of a sequence, `step` apart, and the heads [h0, h1).
struct PositionBlock {
  const ConvProblem& p;
  const Sequence& s;
  int64_t position, step, n, h0, h1;

  int64_t taps() const { return p.taps.taps; }
  int64_t rows() const { return (h1 - h0) * taps(); }  // of a table
};

// n rows of `count` values next to each other, `stride` apart, to columns of a table. Whole vectors of positions are
// written, with zeros behind the n-th.
template <class T>
inline void load_columns(const T* from, int64_t stride, int64_t n, int64_t count, Compute<T>* table, int64_t pitch) {
  using C = Compute<T>;
  constexpr int V = kLanes<C>;
  for (int64_t i = 0; i < n; i += V) {
    const int64_t rows = min(V, n - i);
    for (int64_t j = 0; j < count; j += V) {
      // The last square overlaps the one before it, so that nothing behind a row is read.
      const int64_t at = max(0, min(j, count - V));
      const T* const first = from + i * stride + at;
      Vec<C> square[V];
      if (count >= V && rows == V) {
        CK_UNROLL for (int l = 0; l < V; ++l) square[l] = load_natural(first + l * stride);
      } else {
        for (int l = 0; l < V; ++l)
          square[l] = l < rows ? load_natural(first + l * stride, from + (i + l) * stride + count) : Vec<C>{};
      }
      transpose<C>(square);
      C* const to = table + at * pitch + i;
      if (count >= V) {
        CK_UNROLL for (int l = 0; l < V; ++l) store_bytes(to + l * pitch, square[l]);
      } else {
        for (int l = 0; l < count; ++l) store_bytes(to + l * pitch, square[l]);
      }
    }
  }
}

// The inverse: n columns of a table to rows.
template <class T>
inline void store_columns(const Compute<T>* table, int64_t pitch, int64_t n, int64_t count, T* to, int64_t stride) {
  using C = Compute<T>;
  constexpr int V = kLanes<C>;
  for (int64_t i = 0; i < n; i += V) {
    const int64_t rows = min(V, n - i);
    for (int64_t j = 0; j < count; j += V) {
      const int64_t at = max(0, min(j, count - V));
      const C* const from = table + at * pitch + i;
      T* const first = to + i * stride + at;
      Vec<C> square[V];
      if (count >= V) {
        CK_UNROLL for (int l = 0; l < V; ++l) square[l] = load_bytes<Vec<C>>(from + l * pitch);
      } else {
        for (int l = 0; l < V; ++l) square[l] = l < count ? load_bytes<Vec<C>>(from + l * pitch) : Vec<C>{};
      }
      transpose<C>(square);
      if (count >= V && rows == V) {
        CK_UNROLL for (int l = 0; l < V; ++l) store_natural(first + l * stride, square[l], V);
      } else {
        for (int l = 0; l < rows; ++l) store_natural(first + l * stride, square[l], min(V, count));
      }
    }
  }
}

// Moves n columns of a table from `from` on, at least a vector away, to its front. Whole vectors are moved.
template <class C>
inline void move_columns(C* table, int64_t pitch, int64_t rows, int64_t from, int64_t n) {
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t i = 0; i < n; i += kLanes<C>)
      store_bytes(table + j * pitch + i, load_bytes<Vec<C>>(table + j * pitch + from + i));
}

// Softmax over the taps of one head, for a vector of positions. kBounded: over the taps [lower, upper) of each, with 0
// elsewhere.
template <bool kBounded, class C>
CK_INLINE void softmax_columns(C* table, int64_t pitch, int64_t taps, Vec<C> lower, Vec<C> upper) {
  const Vec<C> none = splat(static_cast<C>(-__builtin_inf()));
  const auto logit = [&](int64_t k) CK_INLINE_LAMBDA {
    const Vec<C> v = load_bytes<Vec<C>>(table + k * pitch), tap = splat(static_cast<C>(k));
    return kBounded ? ((tap >= lower) & (tap < upper) ? v : none) : v;
  };
  Vec<C> top = logit(0), sum = {};
  for (int64_t k = 1; k < taps; ++k) top = vmax<C>(logit(k), top);
  for (int64_t k = 0; k < taps; ++k) {
    const Vec<C> e = vexp2<C>((logit(k) - top) * static_cast<C>(1.44269504088896341));
    store_bytes(table + k * pitch, e);
    sum += e;
  }
  const Vec<C> scale = splat(C{1}) / sum;
  for (int64_t k = 0; k < taps; ++k) {
    const Vec<C> v = load_bytes<Vec<C>>(table + k * pitch) * scale;
    store_bytes(table + k * pitch, kBounded ? (lower < upper ? v : Vec<C>{}) : v);
  }
}

template <class C>
inline void softmax_table(const PositionBlock& b, C* table, int64_t pitch) {
  constexpr int V = kLanes<C>;
  const ConvProblem& p = b.p;
  const int64_t K = b.taps();
  for (int64_t i = 0; i < b.n; i += V) {
    Vec<C> lower = {}, upper = splat(static_cast<C>(K));
    if (p.renormalize) {
      for (int64_t l = 0; l < min(V, b.n - i); ++l) {
        const int64_t position = b.position + b.step * (i + l);
        lower[l] = static_cast<C>(p.taps.first_inside(position, -b.s.history));
        upper[l] = static_cast<C>(p.taps.last_inside(position, b.s.length()));
      }
    }
    for (C* from = table + i; from < table + b.rows() * pitch; from += K * pitch) {
      if (p.renormalize)
        softmax_columns<true, C>(from, pitch, K, lower, upper);
      else
        softmax_columns<false, C>(from, pitch, K, lower, upper);
    }
  }
}

// The mask is drawn per element of the weight: positions that share a filter share its mask.
template <class C>
inline void drop_table(const PositionBlock& b, C* table, int64_t pitch) {
  const ConvProblem& p = b.p;
  const int64_t batch = p.dropout_batch + (p.per_position ? b.s.batch : 0);
  for (int64_t i = 0; i < b.n; ++i) {
    const int64_t t = p.per_position ? b.s.begin + b.position + b.step * i : 0;
    for (int64_t h = b.h0; h < b.h1; ++h) drop_taps(p, batch, t, h, table + (h - b.h0) * b.taps() * pitch + i, pitch);
  }
}

// Fills columns of a table, in whole vectors of positions, and those of `soft` with the filters before dropout if it is
// not null.
template <class C>
inline void make_position_filters(const PositionBlock& b, C* table, C* soft, int64_t pitch) {
  const ConvProblem& p = b.p;
  const int64_t K = b.taps();
  with_dtype(p.weight_dtype, [&](auto* tag) {
    using W = __typeof__(*tag);
    if constexpr (std::is_same_v<Compute<W>, C>) {
      const W* const w = static_cast<const W*>(p.weight) + b.s.batch * p.weight_batch +
                         (b.s.begin + b.position) * p.weight_time + b.h0 * p.weight_head;
      const int64_t stride = b.step * p.weight_time;
      if (p.weight_tap == 1 && (p.weight_head == K || b.h1 - b.h0 == 1)) {
        load_columns(w, stride, b.n, b.rows(), table, pitch);
      } else {
        for (int64_t j = 0; j < b.rows(); ++j) {
          C* const to = table + j * pitch;
          for (int64_t i = 0; i < b.n; ++i)
            to[i] = to_float(w[i * stride + j / K * p.weight_head + j % K * p.weight_tap]);
        }
      }
    }
  });
  if (p.softmax) softmax_table(b, table, pitch);
  if (soft != nullptr)
    for (int64_t j = 0; j < b.rows(); ++j)
      memcpy(static_cast<void*>(soft + j * pitch), table + j * pitch, static_cast<size_t>(b.n) * sizeof(C));
  if (p.dropout > 0.0) drop_table(b, table, pitch);
}

// From d(filters) to d(logits), in place; `soft` are the filters before dropout.
template <class C>
inline void finish_position_gradient(const PositionBlock& b, const C* soft, int64_t soft_pitch, C* gradient,
                                     int64_t pitch) {
  constexpr int V = kLanes<C>;
  const int64_t K = b.taps();
  if (b.p.dropout > 0.0) drop_table(b, gradient, pitch);
  if (!b.p.softmax) return;
  for (int64_t h = 0; h < b.h1 - b.h0; ++h) {
    for (int64_t i = 0; i < b.n; i += V) {
      C* const g = gradient + h * K * pitch + i;
      const C* const w = soft + h * K * soft_pitch + i;
      Vec<C> dot = {};
      for (int64_t k = 0; k < K; ++k) dot += load_bytes<Vec<C>>(w + k * soft_pitch) * load_bytes<Vec<C>>(g + k * pitch);
      for (int64_t k = 0; k < K; ++k)
        store_bytes(g + k * pitch, load_bytes<Vec<C>>(w + k * soft_pitch) * (load_bytes<Vec<C>>(g + k * pitch) - dot));
    }
  }
}

}  // namespace ck::cpu::CK_ISA
