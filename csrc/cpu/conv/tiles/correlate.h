// The gradient of filters, as products of 16 rows of d(y) with the 16 * (steps + 1) rows of their window: tap k has
// diagonal k, or its sum if positions share filters. Products are of the inputs themselves, and NaN and infinity stay
// on diagonals that they belong to. Tiles take denormal numbers for zeros; heads that have any leave a block to
// vectors.
#pragma once

#include "csrc/cpu/conv/tiles/bands.h"
#include "csrc/cpu/conv/tiles/ring.h"

namespace ck::cpu::CK_ISA {

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

  // n rows of filters that all positions share. What vectors compute is added to the sums, a vector for each tap of
  // each head.
  void rows(const bf16* const* in, const bf16* const* grad, int64_t n, bool continues, float* sums) {
    each_head(in, grad, n, continues, [&](int64_t h, int64_t done) CK_INLINE_LAMBDA {
      if (done > 0) steps_ == 1 ? multiply<1>(grad, h) : multiply<2>(grad, h);
      if (done < n)
        Correlate<Src>::heads(in + done, grad + done, n - done, taps_, h * units_, (h + 1) * units_,
                              sums + h * taps_ * kLanes<float>, kLanes<float>);
    });
  }

  // n rows of filters that depend on the position: columns of a table, as Correlate::positions leaves them.
  void positions(const bf16* const* in, const bf16* const* grad, int64_t n, bool continues, float* dots,
                 int64_t pitch) {
    each_head(in, grad, n, continues, [&](int64_t h, int64_t done) CK_INLINE_LAMBDA {
      float* const to = dots + h * taps_ * pitch;
      for (int64_t i = 0; i < done; i += kBandRows)
        steps_ == 1 ? multiply_positions<1>(grad, h, i, to + i, pitch)
                    : multiply_positions<2>(grad, h, i, to + i, pitch);
      for (int64_t i = done; i < n; i += kDotRows)
        Correlate<Src>::positions(in + i, grad + i, taps_, h * units_, (h + 1) * units_, to + i, pitch);
    });
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

  // Calls body(h, rows that tiles multiply).
  template <class Body>
  CK_INLINE void each_head(const bf16* const* in, const bf16* const* grad, int64_t n, bool continues,
                           const Body& body) {
    const int64_t whole = n / kBandRows * kBandRows;
    turned_.move(whole / kBandRows, continues);
    for (int64_t h = 0; h < heads_; ++h) {
      bool denormal = whole > 0 && turn(in, h, continues);
      for (int64_t i = 0; i < whole; i += kBandRows) denormal |= denormal_rows(grad + i, h);
      body(h, denormal ? 0 : whole);
    }
  }

  float* product(int64_t h) const { return products_.get() + h * (steps_ + 1) * kProduct; }

  bool denormal_rows(const bf16* const* rows, int64_t h) const {
    Halves least = ~Halves{};
    for (int64_t i = 0; i < kBandRows; ++i)
      for (int64_t unit = h * units_; unit < (h + 1) * units_; ++unit)
        least = least_magnitude(load_words(rows[i] + unit * 32), least);
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

  // Adds a unit's product of 16 rows of d(y) to tiles 0 to kSteps. The rows lie at equal distances: each is a position
  // of the sequence.
  template <int kSteps>
  CK_INLINE void add(const bf16* const* grad, int64_t unit, int64_t chunk) {
    const bf16* const* const rows = grad + chunk * kBandRows;
    machine_.template load<4>(rows[0] + unit * 32, (rows[1] - rows[0]) * static_cast<int64_t>(sizeof(bf16)));
    machine_.template load<5>(turned_.chunk(unit, chunk), 64);
    machine_.template dot<0, 4, 5>();
    machine_.template load<6>(turned_.chunk(unit, chunk + 1), 64);
    machine_.template dot<1, 4, 6>();
    if constexpr (kSteps == 2) {
      machine_.template load<7>(turned_.chunk(unit, chunk + 2), 64);
      machine_.template dot<2, 4, 7>();
    }
  }

  template <int kSteps>
  void multiply(const bf16* const* grad, int64_t h) {
    float* const to = product(h);
    machine_.template load<0>(to, 64);
    machine_.template load<1>(to + kProduct, 64);
    if constexpr (kSteps == 2) machine_.template load<2>(to + 2 * kProduct, 64);
    for (int64_t unit = h * units_; unit < (h + 1) * units_; ++unit)
      for (int64_t chunk = 0; chunk < turned_.outputs(); ++chunk) add<kSteps>(grad, unit, chunk);
    machine_.template store<0>(to, 64);
    machine_.template store<1>(to + kProduct, 64);
    if constexpr (kSteps == 2) machine_.template store<2>(to + 2 * kProduct, 64);
  }

  // The 16 rows from `first` on. Row i of the product, read from its diagonal on, has the taps of position i.
  template <int kSteps>
  void multiply_positions(const bf16* const* grad, int64_t h, int64_t first, float* to, int64_t pitch) {
    constexpr int64_t kWidth = 16 * (kSteps + 1);
    alignas(64) float product[kBandRows * kWidth + 32];
    machine_.template zero<0>();
    machine_.template zero<1>();
    if constexpr (kSteps == 2) machine_.template zero<2>();
    for (int64_t unit = h * units_; unit < (h + 1) * units_; ++unit) add<kSteps>(grad, unit, first / kBandRows);
    machine_.template store<0>(product, kWidth * 4);
    machine_.template store<1>(product + 16, kWidth * 4);
    if constexpr (kSteps == 2) machine_.template store<2>(product + 32, kWidth * 4);
    for (int64_t k0 = 0; k0 < taps_; k0 += 16) {
      Floats square[16];
      CK_UNROLL for (int i = 0; i < 16; ++i) square[i] = load_floats(product + i * (kWidth + 1) + k0);
      transpose<float>(square);
      for (int64_t k = k0; k < min(k0 + 16, taps_); ++k) store_bytes(to + k * pitch, square[k - k0]);
    }
  }

  Machine& machine_;
  const int64_t taps_, steps_, heads_, units_;
  Ring turned_;
  Scratch<bool> denormal_;
  Scratch<float> products_;
};

}  // namespace ck::cpu::CK_ISA
