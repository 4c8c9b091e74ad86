// What tiles compute of the convolutions: bfloat16 rows in place, long filters of up to 33 taps, heads of whole units
// of 32 channels. Everything else is for vectors.
#pragma once

#include "csrc/cpu/conv/backward.h"
#include "csrc/cpu/conv/tiles/convolve.h"
#include "csrc/cpu/conv/tiles/correlate.h"

namespace ck::cpu::CK_ISA {

// Filters of fewer taps are faster by vectors. Where each 16 rows have bands of their own, making one takes as many
// instructions as adding some 30 taps of a unit does.
inline int64_t fewest_band_taps(const ConvProblem& p) {
  constexpr int64_t kFewest = 11, kTapsOfBand = 30, kTapsOfProduct = 3;
  const int64_t units = p.channels / p.heads / Lanes<bf16>::kUnit;
  return p.per_position || p.renormalize ? max(kFewest, kTapsOfProduct + ceil_div(kTapsOfBand, units)) : kFewest;
}

// Whether bands serve a call. Sequences of fewer rows than a tile has are faster by vectors.
template <class Problem>
inline bool bands_serve(const Problem& p) {
  return p.dtype == Dtype::kBFloat16 && p.channels > 0 && p.channels % (p.heads * Lanes<bf16>::kUnit) == 0 &&
         p.taps.taps >= fewest_band_taps(p) && p.taps.taps <= kMostBandTaps &&
         p.time >= kBandRows * p.taps.dilation * p.sequences && rows_in_place<bf16>(p);
}

// VectorBlocks by tiles.
template <class Machine>
class BandBlocks {
 public:
  using C = float;
  using Src = Lanes<bf16>;
  using Filters = SharedBands;
  static constexpr bool kStaged = false, kAnyHeads = false;
  static constexpr int64_t kBlockRows = BandConvolution<Machine>::kMostChunks * kBandRows;
  // The last tile of a block may begin with its last row, and reads 64 rows.
  static constexpr int64_t kRowsBehind = 48;
  static_assert(kRowsBehind >= kMargin && kRowsBehind >= kBlockMargin && kRowsBehind + 17 >= 64 - 1);
  static constexpr int64_t rows_behind(bool) { return kRowsBehind; }

  BandBlocks(const ConvForward& p, const ChannelPlan&, const ChannelBlock& block, const Filters* shared)
      : BandBlocks(p, block, shared, true, false) {}
  BandBlocks(const ConvBackward& p, const ChannelPlan&, const ChannelBlock& block, const Filters* shared)
      : BandBlocks(p, block, shared, p.grad_x.data != nullptr, p.grad_weight != nullptr) {}

  void convolve(const bf16* const* in, bf16* const* out, int64_t n, bool continues, const C* bias, bool stream,
                const Epilogue<Src>* finish) {
    convolution_.rows(
        in, out, n, continues, shared_->of_heads(h0_), [&](int64_t h) { return shared_->band(h0_ + h); }, bias, stream,
        finish);
  }
  // Each 16 rows have bands of their own.
  void convolve_positions(const bf16* const* in, bf16* const* out, int64_t n, bool continues,
                          const PositionTaps<C>& filters, const C* bias, bool stream, const Epilogue<Src>* finish) {
    for (int64_t i = 0; i < n; i += kBandRows) {
      const int64_t rows = min(kBandRows, n - i);
      convolution_.rows(
          in + i, out + i, rows, continues || i > 0, filters.at(i, 0),
          [&](int64_t h) { return band_.make(filters.at(i, h), rows); }, bias, stream, finish, i);
    }
  }
  void correlate(const bf16* const* in, const bf16* const* grad, int64_t n, bool continues, C* sums) {
    correlation_.rows(in, grad, n, continues, sums + h0_ * taps_ * kLanes<C>);
  }
  void correlate_positions(const bf16* const* in, const bf16* const* grad, int64_t n, bool continues, C* dots,
                           int64_t pitch) {
    correlation_.positions(in, grad, n, continues, dots, pitch);
  }
  void finish(C* sums) { correlation_.finish(sums + h0_ * taps_ * kLanes<C>); }

 private:
  BandBlocks(const ConvProblem& p, const ChannelBlock& block, const Filters* shared, bool convolves, bool correlates)
      : shared_(shared),
        taps_(p.taps.taps),
        h0_(block.first / (p.channels / p.heads)),
        convolution_(machine_, taps_, convolves ? units_of<bf16>(block) : 0, p.channels / p.heads / Src::kUnit),
        band_(taps_, convolves && shared == nullptr),
        correlation_(machine_, taps_, correlates ? block.size() / (p.channels / p.heads) : 0,
                     p.channels / p.heads / Src::kUnit) {}

  Machine machine_;
  const Filters* const shared_;
  const int64_t taps_, h0_;
  BandConvolution<Machine> convolution_;
  PositionBand band_;
  BandCorrelation<Machine> correlation_;
};

}  // namespace ck::cpu::CK_ISA
