// Filters as operands of tiles. 16 rows of outputs are the product of a band, band[i][i + k] = filter(i, k) and zeros
// elsewhere, with the rows of their window.
//
// A band has three terms, which are bfloat16 numbers: the filter value rounded, what that leaves of it, and what both
// leave. Nothing is left then, 24 bits being three times eight, so that products are exact and results as near as with
// float32. Two terms would leave 2^-17 of a value, which is more than the bounds of errors allow.
#pragma once

#include "csrc/cpu/conv/blocks.h"
#include "csrc/cpu/tile_vectors.h"

namespace ck::cpu::CK_ISA {

constexpr int64_t kBandRows = 16;
constexpr int64_t kBandTerms = 3;

// Steps of a product, of 32 rows of a window each, that the taps of 16 rows reach.
constexpr int64_t kMostBandTaps = 33;
CK_INLINE int64_t band_steps(int64_t taps) { return taps <= 17 ? 1 : 2; }

// A term of a band, [16 rows][32 * steps], and the slack into which its last row is written.
CK_INLINE int64_t band_term_size(int64_t steps) { return kBandRows * 32 * steps + 32; }
CK_INLINE int64_t band_size(int64_t steps) { return kBandTerms * band_term_size(steps); }

// Values that three terms hold to the last bit: 0, and those whose last bit is a normal number. Others would lose more
// than the `tiny` of the bounds, next to large inputs; and so would denormal inputs next to values that are larger.
CK_INLINE Words beyond_terms(Floats value) {
  constexpr uint32_t kLeast = (127 - 100) << 23, kMost = (127 + 9) << 23;
  const Words magnitude = (Words)value & 0x7fffffffu;
  return (Words)(magnitude - kLeast > kMost - kLeast) & (Words)(magnitude != Words{});
}

// Writes row i of a band whose memory held zeros, or a band of as many taps. values: 32 * kSteps, zeros behind the last
// tap. Rows are written in ascending order: what stands behind the end of a row are zeros of the next.
template <int kSteps>
CK_INLINE void write_band_row(const Floats* values, int64_t i, bf16* band) {
  Floats rest[2 * kSteps];
  CK_UNROLL for (int v = 0; v < 2 * kSteps; ++v) rest[v] = values[v];
  CK_UNROLL for (int term = 0; term < kBandTerms; ++term) {
    Floats upper[2 * kSteps];
    CK_UNROLL for (int v = 0; v < 2 * kSteps; ++v) {
      upper[v] = (Floats)(rounded(rest[v]) & 0xffff0000u);
      rest[v] -= upper[v];
    }
    bf16* const to = band + term * band_term_size(kSteps) + i * (32 * kSteps + 1);
    CK_UNROLL for (int s = 0; s < kSteps; ++s) store_bytes(to + 32 * s, to_bf16(upper[2 * s], upper[2 * s + 1]));
  }
}

// A band into tiles 2 and 3 (the steps of its first term), 4 and 5, 6 and 7.
template <int kSteps, class Machine>
CK_INLINE void load_band(Machine& m, const bf16* band) {
  const int64_t term = band_term_size(kSteps), row = 64 * kSteps;
  m.template load<2>(band, row);
  m.template load<4>(band + term, row);
  m.template load<6>(band + 2 * term, row);
  if constexpr (kSteps == 2) {
    m.template load<3>(band + 32, row);
    m.template load<5>(band + term + 32, row);
    m.template load<7>(band + 2 * term + 32, row);
  }
}

// Filters that all positions share, and the bands of their heads.
class SharedBands : public SharedFilters<bf16> {
 public:
  SharedBands(const ConvProblem& p, const ChannelPlan& plan, bool transpose, bool keep_soft)
      : SharedFilters(p, plan, transpose, keep_soft),
        steps_(band_steps(p.taps.taps)),
        bands_(p.heads * band_size(steps_)),
        whole_(p.heads) {
    memset(static_cast<void*>(bands_.get()), 0, static_cast<size_t>(p.heads * band_size(steps_)) * sizeof(bf16));
    parallel(p, p.heads, shared_filters_worth_threads(p), [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h) steps_ == 1 ? make_band<1>(p, h) : make_band<2>(p, h);
    });
  }

  // The band of a head, or nullptr where its filter cannot be one.
  const bf16* band(int64_t h) const { return whole_[h] ? bands_.get() + h * band_size(steps_) : nullptr; }

 private:
  template <int kSteps>
  void make_band(const ConvProblem& p, int64_t h) {
    const SharedTaps<float> filter = of_heads(h);
    Floats values[2 * kSteps] = {};
    for (int64_t k = 0; k < p.taps.taps; ++k) values[k / 16][k % 16] = filter.base[k * filter.tap];
    Words beyond = {};
    for (const Floats& v : values) beyond |= beyond_terms(v);
    whole_[h] = !any_bit(beyond);
    for (int64_t i = 0; i < kBandRows; ++i) write_band_row<kSteps>(values, i, bands_.get() + h * band_size(kSteps));
  }

  const int64_t steps_;
  Scratch<bf16> bands_;
  Scratch<bool> whole_;
};

}  // namespace ck::cpu::CK_ISA
