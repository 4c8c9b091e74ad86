// From weights to filters that all positions share: softmax over taps, weight dropout, and the gradients of both.
#pragma once

#include "csrc/common/philox.h"
#include "csrc/cpu/conv/problem.h"
#include "csrc/cpu/lanes.h"
#include "csrc/cpu/parallel.h"

namespace ck::cpu::CK_ISA {

// A run of positions that windows do not leave: a batch row, or one packed sequence of it.
struct Sequence {
  int64_t batch, begin, end;  // positions [begin, end) of batch row `batch`
  int64_t state;              // number of the state that is read
  int64_t before;             // rows that it holds of positions before `begin`
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

}  // namespace ck::cpu::CK_ISA
