// What tiles compute of the convolutions: bfloat16 rows in place, filters of 11 to 33 taps that all positions share,
// heads of whole units of 32 channels. Everything else is for vectors.
#pragma once

#include "csrc/cpu/conv/backward.h"
#include "csrc/cpu/conv/tiles/convolve.h"
#include "csrc/cpu/conv/tiles/correlate.h"

namespace ck::cpu::CK_ISA {

// Whether bands serve a call. Fewer taps are faster by vectors, and so are fewer rows than a tile has.
template <class Problem>
inline bool bands_serve(const Problem& p) {
  constexpr int64_t kFewestTaps = 11;
  return p.dtype == Dtype::kBFloat16 && !p.per_position && !p.renormalize && p.taps.taps >= kFewestTaps &&
         p.taps.taps <= kMostBandTaps && p.channels % p.heads == 0 && p.channels / p.heads % Lanes<bf16>::kUnit == 0 &&
         p.time >= kBandRows * p.taps.dilation && rows_in_place<bf16>(p);
}

// VectorBlocks by tiles.
template <class Machine>
class BandBlocks {
 public:
  using C = float;
  using Src = Lanes<bf16>;
  using Filters = SharedBands;
  static constexpr bool kStaged = false, kPositions = false, kAnyHeads = false;
  static constexpr int64_t kBlockRows = BandConvolution<Machine>::kMostChunks * kBandRows;
  // The last tile of a block may begin with its last row, and reads 64 rows.
  static constexpr int64_t rows_behind(bool) { return 48; }
  static_assert(rows_behind(true) >= max(kMargin, kBlockMargin) && rows_behind(true) + 17 >= 64 - 1);

  BandBlocks(const ConvForward& p, const ChannelPlan&, const ChannelBlock& block, const Filters* shared)
      : BandBlocks(p, block, shared, true, false) {}
  BandBlocks(const ConvBackward& p, const ChannelPlan&, const ChannelBlock& block, const Filters* shared)
      : BandBlocks(p, block, shared, p.grad_x.data != nullptr, p.grad_weight != nullptr) {}

  void convolve(const bf16* const* in, bf16* const* out, int64_t n, bool continues, const C* bias, bool stream) {
    convolution_.rows(
        in, out, n, continues, shared_->of_heads(h0_), [&](int64_t h) { return shared_->band(h0_ + h); }, bias, stream);
  }
  void correlate(const bf16* const* in, const bf16* const* grad, int64_t n, bool continues, C* sums) {
    correlation_.rows(in, grad, n, continues, sums + h0_ * taps_ * kLanes<C>);
  }
  void finish(C* sums) { correlation_.finish(sums + h0_ * taps_ * kLanes<C>); }

 private:
  BandBlocks(const ConvProblem& p, const ChannelBlock& block, const Filters* shared, bool convolves, bool correlates)
      : shared_(shared),
        taps_(p.taps.taps),
        h0_(block.first / (p.channels / p.heads)),
        convolution_(machine_, taps_, convolves ? units_of<bf16>(block) : 0, p.channels / p.heads / Src::kUnit),
        correlation_(machine_, taps_, correlates ? block.size() / (p.channels / p.heads) : 0,
                     p.channels / p.heads / Src::kUnit) {}

  Machine machine_;
  const Filters* const shared_;
  const int64_t taps_, h0_;
  BandConvolution<Machine> convolution_;
  BandCorrelation<Machine> correlation_;
};

}  // namespace ck::cpu::CK_ISA
