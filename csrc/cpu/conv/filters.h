// From weights to filters: softmax over taps, weight dropout, and the gradients of both.
#pragma once

#include "csrc/common/philox.h"
#include "csrc/cpu/conv/problem.h"
#include "csrc/cpu/lanes.h"
#include "csrc/cpu/parallel.h"

namespace ck::cpu::CK_ISA {

// A run of positions that windows do not leave: a batch row, or one packed sequence of it.
struct Sequence {
  int64_t batch, begin, end;  // positions [begin, end) of batch row `batch`
  int64_t state_row;          // row of ConvProblem::state
  int64_t history;            // positions before `begin` that count as inside the sequence

  int64_t length() const { return end - begin; }
};

// Multiplies the taps of weight row (b, t, h) by the dropout mask: 0 or 1 / (1 - p).
template <class C>
inline void drop_taps(const ConvProblem& p, int64_t b, int64_t t, int64_t h, C* row, int64_t stride) {
  const uint64_t threshold = drop_threshold(p.dropout);
  const C keep = p.dropout < 1.0 ? static_cast<C>(1.0 / (1.0 - p.dropout)) : C{0};
  for (int64_t k = 0; k < p.taps.taps; k += 4) {
    const PhiloxBlock random = tap_words(p.seed, b, t, h, k / 4);
    const int64_t n = min(4, p.taps.taps - k);
    for (int64_t i = 0; i < n; ++i)
      row[(k + i) * stride] = random.word[i] >= threshold ? row[(k + i) * stride] * keep : C{0};
  }
}

// Filters shared by all positions are tap-major: table[k * pitch + h].
inline int64_t shared_pitch(const ConvProblem& p) { return round_up(p.heads, kLanes<float>); }

inline bool shared_filters_worth_threads(const ConvProblem& p) { return p.heads * p.taps.taps >= 4096; }

// Fills `filters`, and `soft` (the filters before dropout) if it is not null.
template <class C>
inline void make_shared_filters(const ConvProblem& p, C* filters, C* soft) {
  constexpr int V = kLanes<C>;
  const int64_t pitch = shared_pitch(p), K = p.taps.taps;
  parallel(p, ceil_div(p.heads, V), shared_filters_worth_threads(p), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t h0 = block * V, n = min(V, p.heads - h0);
      C* const out = filters + h0;
      with_dtype(p.weight_dtype, [&](auto* tag) {
        const auto* w = static_cast<decltype(tag)>(const_cast<void*>(p.weight)) + h0 * p.weight_head;
        for (int64_t k = 0; k < K; ++k) {
          Vec<C> v = {};
          for (int64_t l = 0; l < n; ++l) v[l] = to_float(w[l * p.weight_head + k * p.weight_tap]);
          store_bytes(out + k * pitch, v);
        }
      });
      if (p.softmax) {
        Vec<C> top = load_bytes<Vec<C>>(out), sum = {};
        for (int64_t k = 1; k < K; ++k) top = vmax<C>(load_bytes<Vec<C>>(out + k * pitch), top);
        for (int64_t k = 0; k < K; ++k) {
          const Vec<C> e = vexp(load_bytes<Vec<C>>(out + k * pitch) - top);
          store_bytes(out + k * pitch, e);
          sum += e;
        }
        for (int64_t k = 0; k < K; ++k) store_bytes(out + k * pitch, load_bytes<Vec<C>>(out + k * pitch) / sum);
      }
      if (soft != nullptr)
        for (int64_t k = 0; k < K; ++k) store_bytes(soft + h0 + k * pitch, load_bytes<Vec<C>>(out + k * pitch));
      if (p.dropout > 0.0)
        for (int64_t l = 0; l < n; ++l) drop_taps(p, p.dropout_batch, 0, h0 + l, out + l, pitch);
    }
  });
}

// From d(filters) (tap-major, overwritten) to d(weight) in the weight's own type, [heads][taps].
template <class C>
inline void finish_shared_gradient(const ConvProblem& p, C* gradient, const C* soft, void* out) {
  constexpr int V = kLanes<C>;
  const int64_t pitch = shared_pitch(p), K = p.taps.taps;
  parallel(p, ceil_div(p.heads, V), shared_filters_worth_threads(p), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t h0 = block * V, n = min(V, p.heads - h0);
      C* const g = gradient + h0;
      if (p.dropout > 0.0)
        for (int64_t l = 0; l < n; ++l) drop_taps(p, p.dropout_batch, 0, h0 + l, g + l, pitch);
      if (p.softmax) {
        Vec<C> dot = {};
        for (int64_t k = 0; k < K; ++k)
          dot += load_bytes<Vec<C>>(g + k * pitch) * load_bytes<Vec<C>>(soft + h0 + k * pitch);
        for (int64_t k = 0; k < K; ++k)
          store_bytes(g + k * pitch,
                      load_bytes<Vec<C>>(soft + h0 + k * pitch) * (load_bytes<Vec<C>>(g + k * pitch) - dot));
      }
      with_dtype(p.weight_dtype, [&](auto* tag) {
        auto* w = static_cast<decltype(tag)>(out);
        for (int64_t l = 0; l < n; ++l)
          for (int64_t k = 0; k < K; ++k) from_float(g[k * pitch + l], w[(h0 + l) * K + k]);
      });
    }
  });
}

template <class C>
CK_INLINE Vec<C> lane_numbers() {
  Vec<C> v = {};
  for (int i = 0; i < kLanes<C>; ++i) v[i] = static_cast<C>(i);
  return v;
}

// out[0 .. taps) = softmax of row[0 .. taps) over the taps [first, last), 0 elsewhere. Whole vectors are written: the
// caller fills rows in ascending order. kVectors > 0: the row fits into so many vectors, which stay in registers.
template <class C, int kVectors>
CK_INLINE void softmax_row(const C* row, C* out, int64_t taps, int64_t first, int64_t last) {
  constexpr int V = kLanes<C>;
  const Vec<C> lane = lane_numbers<C>(), none = splat(static_cast<C>(-__builtin_inf()));
  const Vec<C> lower = splat(static_cast<C>(first)), upper = splat(static_cast<C>(last));
  const auto logits = [&](int64_t i) CK_INLINE_LAMBDA {
    const Vec<C> k = lane + static_cast<C>(i * V), v = load_bytes<Vec<C>>(row + i * V);
    return (k >= lower) & (k < upper) ? v : none;
  };
  if constexpr (kVectors > 0) {
    Vec<C> e[kVectors];
    CK_UNROLL for (int i = 0; i < kVectors; ++i) e[i] = logits(i);
    Vec<C> top = e[0];
    CK_UNROLL for (int i = 1; i < kVectors; ++i) top = vmax<C>(top, e[i]);
    const Vec<C> shift = splat(max_lanes<C>(top));
    Vec<C> sum = {};
    CK_UNROLL for (int i = 0; i < kVectors; ++i) sum += e[i] = vexp(e[i] - shift);
    const Vec<C> scale = splat(C{1} / sum_lanes<C>(sum));
    CK_UNROLL for (int i = 0; i < kVectors; ++i) store_bytes(out + i * V, e[i] * scale);
  } else {
    const int64_t n = ceil_div(taps, V);
    Vec<C> top = none, sum = {};
    for (int64_t i = 0; i < n; ++i) top = vmax<C>(logits(i), top);
    const Vec<C> shift = splat(max_lanes<C>(top));
    for (int64_t i = 0; i < n; ++i) {
      const Vec<C> e = vexp(logits(i) - shift);
      store_bytes(out + i * V, e);
      sum += e;
    }
    const Vec<C> scale = splat(C{1} / sum_lanes<C>(sum));
    for (int64_t i = 0; i < n; ++i) store_bytes(out + i * V, load_bytes<Vec<C>>(out + i * V) * scale);
  }
}

// The mask is drawn per element of the weight: positions that share a filter share its mask.
template <class C>
inline void drop_position_taps(const ConvProblem& p, const Sequence& s, int64_t position, int64_t h, C* row) {
  if (p.per_position)
    drop_taps(p, p.dropout_batch + s.batch, s.begin + position, h, row, 1);
  else
    drop_taps(p, p.dropout_batch, 0, h, row, 1);
}

// The filters of heads [h0, h1) at one position: out[(h - h0) * taps + k], and before dropout in `soft` if it is not
// null. `logits` is scratch of the same size. Both outputs have a vector of slack.
template <class C>
inline void make_position_filters(const ConvProblem& p, const Sequence& s, int64_t position, int64_t h0, int64_t h1,
                                  C* logits, C* out, C* soft) {
  constexpr int V = kLanes<C>;
  const int64_t K = p.taps.taps, count = (h1 - h0) * K, t = s.begin + position;
  C* const raw = p.softmax ? logits : out;
  with_dtype(p.weight_dtype, [&](auto* tag) {
    using W = __typeof__(*tag);
    if constexpr (sizeof(W) <= sizeof(C) && (sizeof(W) == 8) == (sizeof(C) == 8)) {
      const W* base = static_cast<const W*>(p.weight);
      const W* w = base + s.batch * p.weight_batch + t * p.weight_time + h0 * p.weight_head;
      if (p.weight_tap == 1 && p.weight_head == K) {
        for (int64_t i = 0; i < count; i += V) store_bytes(raw + i, load_natural(w + i, w + count));
      } else {
        for (int64_t h = 0; h < h1 - h0; ++h)
          for (int64_t k = 0; k < K; ++k) raw[h * K + k] = to_float(w[h * p.weight_head + k * p.weight_tap]);
      }
    }
  });
  if (p.softmax) {
    const int64_t first = p.renormalize ? p.taps.first_inside(position, -s.history) : 0;
    const int64_t last = p.renormalize ? p.taps.last_inside(position, s.length()) : K;
    for (int64_t h = 0; h < h1 - h0; ++h) {
      const C* row = logits + h * K;
      C* const to = out + h * K;
      if (first >= last) {
        memset(static_cast<void*>(to), 0, static_cast<size_t>(K) * sizeof(C));
        continue;
      }
      switch (ceil_div(K, V)) {
        case 1: softmax_row<C, 1>(row, to, K, first, last); break;
        case 2: softmax_row<C, 2>(row, to, K, first, last); break;
        case 3: softmax_row<C, 3>(row, to, K, first, last); break;
        case 4: softmax_row<C, 4>(row, to, K, first, last); break;
        default: softmax_row<C, 0>(row, to, K, first, last);
      }
    }
  }
  if (soft != nullptr) memcpy(static_cast<void*>(soft), out, static_cast<size_t>(count) * sizeof(C));
  if (p.dropout > 0.0)
    for (int64_t h = h0; h < h1; ++h) drop_position_taps(p, s, position, h, out + (h - h0) * K);
}

// From d(filters) of one position to d(logits), in place; `soft` are the filters before dropout.
template <class C>
inline void finish_position_gradient(const ConvProblem& p, const Sequence& s, int64_t position, int64_t h0, int64_t h1,
                                     const C* soft, C* gradient) {
  constexpr int V = kLanes<C>;
  const int64_t K = p.taps.taps;
  for (int64_t h = 0; h < h1 - h0; ++h) {
    C* const g = gradient + h * K;
    if (p.dropout > 0.0) drop_position_taps(p, s, position, h0 + h, g);
    if (!p.softmax) continue;
    const C* const w = soft + h * K;
    const Vec<C> lane = lane_numbers<C>();
    Vec<C> dot = {};
    for (int64_t k = 0; k < K; k += V) {
      const Vec<C> product = load_bytes<Vec<C>>(w + k) * load_bytes<Vec<C>>(g + k);
      dot += lane < splat(static_cast<C>(K - k)) ? product : Vec<C>{};
    }
    const Vec<C> shift = splat(sum_lanes<C>(dot));
    int64_t k = 0;
    for (; k + V <= K; k += V) store_bytes(g + k, load_bytes<Vec<C>>(w + k) * (load_bytes<Vec<C>>(g + k) - shift));
    if (k < K) {
      // The lanes past the row belong to the next one and keep what they hold.
      const Vec<C> old = load_bytes<Vec<C>>(g + k);
      store_bytes(g + k, lane < splat(static_cast<C>(K - k)) ? load_bytes<Vec<C>>(w + k) * (old - shift) : old);
    }
  }
}

}  // namespace ck::cpu::CK_ISA
