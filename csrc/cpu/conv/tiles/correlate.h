// The gradient of filters that rows share, as products of 16 rows of d(y) with the 16 * (steps + 1) rows of their
// window: tap k is the sum of diagonal k. Products are of the inputs themselves, and NaN and infinity stay on diagonals
// that they belong to. Tiles take denormal numbers for zeros; heads that have any leave a block to vectors.
#pragma once

#include "csrc/cpu/conv/tiles/bands.h"
#include "csrc/cpu/conv/tiles/ring.h"

namespace ck::cpu::CK_ISA {

// Lane by lane the least of before and of the magnitudes of 32 numbers, less one, so that 0 is the greatest.
CK_INLINE Halves least_magnitude(Words numbers, Halves before) {
  const Halves magnitude = ((Halves)numbers & 0x7fff) - 1;
  return magnitude < before ? magnitude : before;
}
CK_INLINE bool any_denormal(Halves least) { return any_bit((Words)(least < 0x7f)); }

template <class Machine>
class BandCorrelation {
 public:
  using Src = Lanes<bf16>;
  static constexpr int64_t kMostChunks = 2;  // of rows of d(y) of a block

  // heads: 0 where there is no gradient of filters.
  BandCorrelation(Machine& machine, int64_t taps, int64_t heads, int64_t units_per_head)
      : machine_(machine),
        taps_(taps),
        steps_(band_steps(taps)),
        heads_(heads),
        units_(units_per_head),
        turned_(heads * units_per_head, kMostChunks, steps_, false),
        denormal_(heads * kWindow),
        products_(heads * (steps_ + 1) * kProduct) {
    if (heads > 0)
      memset(static_cast<void*>(products_.get()), 0,
             static_cast<size_t>(heads * (steps_ + 1) * kProduct) * sizeof(float));
  }

  // n rows. What vectors compute is added to the sums, a vector for each tap of each head.
  void rows(const bf16* const* in, const bf16* const* grad, int64_t n, bool continues, float* sums) {
    const int64_t chunks = n / kBandRows;
    turned_.move(chunks, continues);
    for (int64_t h = 0; h < heads_; ++h) {
      const int64_t first = h * units_, last = first + units_;
      bool denormal = turn(in, h, continues);
      for (int64_t i = 0; i < chunks * kBandRows; i += kBandRows) denormal |= denormal_rows(grad + i, first, last);
      const int64_t done = denormal ? 0 : chunks * kBandRows;
      if (done > 0) steps_ == 1 ? multiply<1>(grad, h) : multiply<2>(grad, h);
      if (done < n)
        Correlate<Src>::heads(in + done, grad + done, n - done, taps_, first, last, sums + h * taps_ * kLanes<float>,
                              kLanes<float>);
    }
  }

  // Adds the diagonals of what tiles have multiplied: row i of a product to lane i.
  void finish(float* sums) const {
    for (int64_t h = 0; h < heads_; ++h)
      for (int64_t k = 0; k < taps_; ++k)
        for (int64_t i = 0; i < kBandRows; ++i)
          sums[(h * taps_ + k) * kLanes<float> + i] += product(h)[(i + k) / 16 * kProduct + i * 16 + (i + k) % 16];
  }

 private:
  static constexpr int64_t kProduct = 256, kWindow = kMostChunks + 2;

  float* product(int64_t h) const { return products_.get() + h * (steps_ + 1) * kProduct; }

  static bool denormal_rows(const bf16* const* rows, int64_t first, int64_t last) {
    Halves least = ~Halves{};
    for (int64_t i = 0; i < kBandRows; ++i)
      for (int64_t unit = first; unit < last; ++unit) least = least_magnitude(load_words(rows[i] + unit * 32), least);
    return any_denormal(least);
  }

  // Rows of the window that are not there yet, as right operands whose rows are pairs of channels. Whether a number of
  // the window is denormal.
  bool turn(const bf16* const* in, int64_t h, bool continues) {
    bool* const denormal = denormal_.get() + h * kWindow;
    if (continues)
      for (int64_t chunk = 0; chunk < turned_.missing(); ++chunk) denormal[chunk] = denormal[chunk + kMostChunks];
    bool any = false;
    for (int64_t chunk = turned_.missing(); chunk < turned_.count(); ++chunk) {
      const bf16* const* const rows = in + chunk * kChunkRows;
      Halves least = ~Halves{};
      for (int64_t unit = h * units_; unit < (h + 1) * units_; ++unit)
        turned_.fill(unit, chunk, [&](bf16* to) CK_INLINE_LAMBDA {
          Words turned[16];
          transpose_rows([&](int64_t i) CK_INLINE_LAMBDA { return reinterpret_cast<const char*>(rows[i] + unit * 32); },
                         turned);
          CK_UNROLL for (int i = 0; i < 16; ++i) {
            store_bytes(to + i * 32, turned[i]);
            least = least_magnitude(turned[i], least);
          }
        });
      denormal[chunk] = any_denormal(least);
    }
    for (int64_t chunk = 0; chunk < turned_.count(); ++chunk) any |= denormal[chunk];
    return any;
  }

  // Rows of d(y) lie at equal distances: each is a position of the sequence.
  template <int kSteps>
  void multiply(const bf16* const* grad, int64_t h) {
    const int64_t row_bytes = (grad[1] - grad[0]) * static_cast<int64_t>(sizeof(bf16));
    float* const to = product(h);
    machine_.template load<0>(to, 64);
    machine_.template load<1>(to + kProduct, 64);
    if constexpr (kSteps == 2) machine_.template load<2>(to + 2 * kProduct, 64);
    for (int64_t unit = h * units_; unit < (h + 1) * units_; ++unit)
      for (int64_t chunk = 0; chunk < turned_.outputs(); ++chunk) {
        machine_.template load<4>(grad[chunk * kBandRows] + unit * 32, row_bytes);
        machine_.template load<5>(turned_.chunk(unit, chunk), 64);
        machine_.template dot<0, 4, 5>();
        machine_.template load<6>(turned_.chunk(unit, chunk + 1), 64);
        machine_.template dot<1, 4, 6>();
        if constexpr (kSteps == 2) {
          machine_.template load<7>(turned_.chunk(unit, chunk + 2), 64);
          machine_.template dot<2, 4, 7>();
        }
      }
    machine_.template store<0>(to, 64);
    machine_.template store<1>(to + kProduct, 64);
    if constexpr (kSteps == 2) machine_.template store<2>(to + 2 * kProduct, 64);
  }

  Machine& machine_;
  const int64_t taps_, steps_, heads_, units_;
  Ring turned_;
  Scratch<bool> denormal_;
  Scratch<float> products_;
};

}  // namespace ck::cpu::CK_ISA
