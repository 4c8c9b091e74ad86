// Dropout of attention's weights, a vector of random words at a time.
#pragma once

#include "csrc/common/philox.h"
#include "csrc/cpu/attention/problem.h"
#include "csrc/cpu/simd.h"

namespace ck::cpu::CK_ISA {

// WordProduct for vectors: words at even and at odd positions are multiplied apart, in lanes twice as wide.
struct VectorProduct {
  CK_INLINE void operator()(uint32_t factor, Vec<uint32_t> word, Vec<uint32_t>& high, Vec<uint32_t>& low) const {
    using Wide = Vec<uint64_t>;
    const Wide lower = splat<uint64_t>(0xffffffffu), upper = ~lower;
    const Wide even = ((Wide)word & lower) * uint64_t{factor}, odd = ((Wide)word >> 32) * uint64_t{factor};
    high = (Vec<uint32_t>)((even >> 32) | (odd & upper));
    low = (Vec<uint32_t>)((even & lower) | (odd << 32));
  }
};

// The even lanes of the result come from a, the odd ones from b: a[0] b[0] a[1] b[1], and so on.
template <class S, int... kLane>
CK_INLINE void interleave(Vec<S> a, Vec<S> b, Vec<S>& low, Vec<S>& high, std::integer_sequence<int, kLane...>) {
  constexpr int V = kLanes<S>;
  using Index = Vec<int32_t>;
  low = __builtin_shuffle(a, b, Index{(kLane % 2 * V + kLane / 2)...});
  high = __builtin_shuffle(a, b, Index{(kLane % 2 * V + kLane / 2 + V / 2)...});
}

// Multipliers 0 or 1 / (1 - dropout) of n elements of a row of p; first and n are multiples of 4. Whole vectors are
// written.
template <class C>
inline void draw(const AttentionProblem& p, int64_t b, int64_t h, int64_t i, int64_t first, int64_t n, C* out) {
  using Words = Vec<uint32_t>;
  constexpr int V = kLanes<uint32_t>;
  constexpr auto kAll = std::make_integer_sequence<int, V>();
  const uint64_t threshold = drop_threshold(p.dropout);
  const C keep = p.dropout < 1.0 ? static_cast<C>(1.0 / (1.0 - p.dropout)) : C{0};
  Words lane = {};
  for (int l = 0; l < V; ++l) lane[l] = static_cast<uint32_t>(l);
  for (int64_t j = 0; j < n; j += 4 * V) {
    Words c[4] = {splat(static_cast<uint32_t>(i)), splat(static_cast<uint32_t>(b)), splat(static_cast<uint32_t>(h)),
                  lane + static_cast<uint32_t>((first + j) / 4)};
    philox_rounds(c[0], c[1], c[2], c[3], static_cast<uint32_t>(p.seed), static_cast<uint32_t>(p.seed >> 32),
                  VectorProduct{});
    // Element 4 * l + w belongs to word w of block l.
    Words even[2], odd[2], word[4];
    interleave<uint32_t>(c[0], c[2], even[0], even[1], kAll);
    interleave<uint32_t>(c[1], c[3], odd[0], odd[1], kAll);
    CK_UNROLL for (int w = 0; w < 2; ++w) interleave<uint32_t>(even[w], odd[w], word[2 * w], word[2 * w + 1], kAll);
    for (int64_t w = 0; w < 4 && j + w * V < n; ++w) {
      C* const to = out + j + w * V;
      if constexpr (sizeof(C) == 4) {
        // The threshold of p = 1 does not fit; then both results are 0.
        store_bytes(to, word[w] >= static_cast<uint32_t>(threshold) ? splat(keep) : Vec<C>{});
      } else {
        for (int l = 0; l < V; ++l) to[l] = word[w][l] >= threshold ? keep : C{0};
      }
    }
  }
}

}  // namespace ck::cpu::CK_ISA
