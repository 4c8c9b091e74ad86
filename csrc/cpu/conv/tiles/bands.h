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
class TermRange {
 public:
  CK_INLINE void add(Floats value) {
    const Words magnitude = (Words)value & 0x7fffffffu, below = magnitude - 1;  // 0 is the greatest
    most_ = magnitude > most_ ? magnitude : most_;
    least_ = below < least_ ? below : least_;
  }
  // Whether that is all of those in the lanes of a mask.
  CK_INLINE bool holds(uint32_t lanes) const {
    constexpr uint32_t kLeast = (127 - 100) << 23, kMost = (127 + 9) << 23;
    return !any_bit(keep_lanes(lanes, (Words)(most_ > kMost) | (Words)(least_ < kLeast - 1)));
  }

 private:
  Words most_ = {}, least_ = ~Words{};
};

// Vectors of a row of a filter: 32 taps, or more.
CK_INLINE constexpr int band_vectors(int64_t taps) { return taps <= 32 ? 2 : 4; }

// Writes row i of a band of `steps` steps, whose memory held zeros, or a band of as many taps. values: zeros behind the
// last tap. Rows are written in ascending order: what stands behind the end of a row are zeros of the next.
template <int kVectors>
CK_INLINE void write_band_row(const Floats* values, int64_t i, int64_t steps, bf16* band) {
  Floats rest[kVectors];
  CK_UNROLL for (int v = 0; v < kVectors; ++v) rest[v] = values[v];
  CK_UNROLL for (int term = 0; term < kBandTerms; ++term) {
    Floats upper[kVectors];
    CK_UNROLL for (int v = 0; v < kVectors; ++v) {
      upper[v] = term < kBandTerms - 1 ? high_halves(rounded(rest[v])) : rest[v];
      rest[v] -= upper[v];
    }
    bf16* const to = band + term * band_term_size(steps) + i * (32 * steps + 1);
    CK_UNROLL for (int v = 0; v < kVectors; v += 2) store_bytes(to + 16 * v, to_bf16(upper[v], upper[v + 1]));
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
      for (int64_t h = begin; h < end; ++h)
        band_vectors(p.taps.taps) == 2 ? make_band<2>(p.taps.taps, h) : make_band<4>(p.taps.taps, h);
    });
  }

  // The band of a head, or nullptr where its filter cannot be one.
  const bf16* band(int64_t h) const { return whole_[h] ? bands_.get() + h * band_size(steps_) : nullptr; }

 private:
  template <int kVectors>
  void make_band(int64_t taps, int64_t h) {
    const SharedTaps<float> filter = of_heads(h);
    Floats values[kVectors] = {};
    for (int64_t k = 0; k < taps; ++k) values[k / 16][k % 16] = filter.base[k * filter.tap];
    TermRange range;
    for (const Floats& v : values) range.add(v);
    whole_[h] = range.holds(0xffff);
    for (int64_t i = 0; i < kBandRows; ++i)
      write_band_row<kVectors>(values, i, steps_, bands_.get() + h * band_size(steps_));
  }

  const int64_t steps_;
  Scratch<bf16> bands_;
  Scratch<bool> whole_;
};

// A band of filters that depend on the position, and the next one in its place.
class PositionBand {
 public:
  // wanted: whether any will be made.
  PositionBand(int64_t taps, bool wanted) : taps_(taps), band_(wanted ? band_size(band_steps(taps)) : 0) {
    if (wanted) memset(static_cast<void*>(band_.get()), 0, static_cast<size_t>(band_size(band_steps(taps))) * 2);
  }

  // The band of n rows of a head; nullptr where they cannot be one.
  const bf16* make(const PositionTaps<float>& filter, int64_t n) const {
    return (band_vectors(taps_) == 2 ? write<2>(filter, n) : write<4>(filter, n)) ? band_.get() : nullptr;
  }

 private:
  // Taps of 16 positions are turned to 16 taps of a position. The last tap stands in for those behind it until then.
  template <int kVectors>
  bool write(const PositionTaps<float>& filter, int64_t n) const {
    const int64_t taps = taps_, steps = band_steps(taps);
    Floats values[kVectors][16];
    TermRange range;
    CK_UNROLL for (int v = 0; v < kVectors; ++v) {
      CK_UNROLL for (int k = 0; k < 16; ++k) {
        values[v][k] = load_floats(filter.base + min(16 * v + k, taps - 1) * filter.tap);
        range.add(values[v][k]);
      }
      transpose<float>(values[v]);
    }
    for (int64_t i = 0; i < kBandRows; ++i) {
      Floats row[kVectors];
      CK_UNROLL for (int v = 0; v < kVectors; ++v) {
        const int64_t inside = max(0, min(16, taps - 16 * v));
        row[v] = keep_lanes((1u << inside) - 1, values[v][i]);
      }
      write_band_row<kVectors>(row, i, steps, band_.get());
    }
    return range.holds((1u << n) - 1);
  }

  const int64_t taps_;
  Scratch<bf16> band_;
};

}  // namespace ck::cpu::CK_ISA
