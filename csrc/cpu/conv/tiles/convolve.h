// The convolution of rows in place as products of bands and windows.
//
// Rows of a window become right operands, [pairs of rows][2 parts][16 channels], whose columns are the lanes of the
// parts of a unit, so that sums are stored, and biases added, as by vectors. Where a tile of 16 rows of a unit has a
// sum that is not finite, vectors compute it again: zeros of the band have met a NaN or an infinity that its outputs do
// not read, or one has been read. What is computed again does not depend on where blocks begin.
#pragma once

#include "csrc/cpu/conv/tiles/bands.h"
#include "csrc/cpu/conv/tiles/ring.h"

namespace ck::cpu::CK_ISA {

template <class Machine>
class BandConvolution {
 public:
  using Src = Lanes<bf16>;
  static constexpr int64_t kMostChunks = 2;  // of outputs of a block

  // units: 0 where nothing is to be convolved.
  BandConvolution(Machine& machine, int64_t taps, int64_t units, int64_t units_per_head)
      : machine_(machine),
        taps_(taps),
        steps_(band_steps(taps)),
        units_(units),
        units_per_head_(units_per_head),
        ring_(units, kMostChunks, 2 * steps_ - 1, true),
        sums_(units > 0 ? 2 * kMostChunks * kChunkSize : 0) {}

  // n rows. `band(h)` gives the band of a head of the block, or nullptr where vectors compute it, by `filter`. Each
  // is asked for once that of the head before is in tiles.  first: the row of `finish` that row 0 is.
  template <class Filter, class BandOf>
  void rows(const bf16* const* in, bf16* const* out, int64_t n, bool continues, const Filter& filter,
            const BandOf& band, const float* bias, bool stream, const Epilogue<Src>* finish, int64_t first = 0) {
    ring_.move(ceil_div(n, kBandRows), continues);
    if (steps_ == 1)
      walk<1>({in, out, n, bias, stream, finish, first}, filter, band);
    else
      walk<2>({in, out, n, bias, stream, finish, first}, filter, band);
  }

 private:
  struct Rows {
    const bf16* const* in;
    bf16* const* out;
    int64_t n;
    const float* bias;
    bool stream;
    const Epilogue<Src>* finish;
    int64_t first;
  };

  // Unit after unit: while this one is multiplied, rows of the next one become operands and sums of the one before are
  // stored.
  template <int kSteps, class Filter, class BandOf>
  CK_INLINE void walk(const Rows& r, const Filter& filter, const BandOf& band_of) {
    const bf16* next = band_of(0);
    bool banded = false;
    int64_t head = 0;
    pair_rows(r.in, 0);
    for (int64_t unit = 0; unit <= units_; ++unit) {
      const bool was_banded = banded;
      if (unit < units_) {
        const bool begins = unit == head * units_per_head_;
        if (begins) {
          banded = next != nullptr;
          if (banded) load_band<kSteps>(machine_, next);
          ++head;
        }
        if (banded) multiply<kSteps>(unit, r.bias);
        if (begins && unit + units_per_head_ < units_) next = band_of(head);
        if (unit + 1 < units_) pair_rows(r.in, unit + 1);
      }
      if (unit > 0) store(r, unit - 1, was_banded, filter);
    }
  }

  float* sums(int64_t unit, int64_t chunk) const { return sums_.get() + (unit % 2 * kMostChunks + chunk) * kChunkSize; }

  void pair_rows(const bf16* const* in, int64_t unit) const {
    const int64_t c = unit * 32;
    for (int64_t chunk = ring_.missing(); chunk < ring_.count(); ++chunk) {
      const bf16* const* const rows = in + chunk * kChunkRows;
      ring_.fill(unit, chunk, [&](bf16* to) CK_INLINE_LAMBDA {
        CK_UNROLL for (int pair = 0; pair < 8; ++pair) {
          const Words even = load_words(rows[2 * pair] + c), odd = load_words(rows[2 * pair + 1] + c);
          store_bytes(to + pair * 64, join_lower_halves(even, odd));
          store_bytes(to + pair * 64 + 32, join_halves(even, odd));
        }
      });
    }
  }

  // Small terms first. A tile of sums begins with 16 times the bias.
  template <int kSteps>
  CK_INLINE void multiply(int64_t unit, const float* bias) {
    for (int64_t chunk = 0; chunk < ring_.outputs(); ++chunk) {
      const bf16* const near = ring_.chunk(unit, chunk);
      const bf16* const far = ring_.chunk(unit, chunk + 2 * kSteps - 2);
      float* const to = sums(unit, chunk);
      CK_UNROLL for (int part = 0; part < 2; ++part) {
        if (bias != nullptr)
          machine_.template load<0>(bias + unit * 32 + part * 16, 0);
        else
          machine_.template zero<0>();
        machine_.template load<1>(near + part * 32, 128);
        machine_.template dot<0, 6, 1>();
        machine_.template dot<0, 4, 1>();
        machine_.template dot<0, 2, 1>();
        if constexpr (kSteps == 2) {
          machine_.template load<1>(far + part * 32, 128);
          machine_.template dot<0, 7, 1>();
          machine_.template dot<0, 5, 1>();
          machine_.template dot<0, 3, 1>();
        }
        machine_.template store<0>(to + part * 16, 128);
      }
    }
  }

  template <class Filter>
  CK_INLINE void store(const Rows& r, int64_t unit, bool banded, const Filter& filter) const {
    for (int64_t i = 0, chunk = 0; i < r.n; i += kBandRows, ++chunk) {
      const int64_t rows = min(kBandRows, r.n - i);
      if (!banded || !store_sums(sums(unit, chunk), r, i, rows, unit))
        compute_again(r, i, rows, unit, filter.at(i, unit / units_per_head_));
    }
  }

  // Whether all sums are finite.
  static CK_INLINE bool store_sums(const float* from, const Rows& r, int64_t first, int64_t rows, int64_t unit) {
    bf16* const* const out = r.out + first;
    Floats flaw[2] = {};  // NaN once a sum is not finite
    const auto row = [&](int64_t i) CK_INLINE_LAMBDA {
      const Floats v[2] = {load_floats(from + i * 32), load_floats(from + i * 32 + 16)};
      CK_UNROLL for (int part = 0; part < 2; ++part) flaw[part] = fused(v[part], Floats{}, flaw[part]);
      if (r.finish == nullptr)
        Src::store<false>(out[i], unit, v, r.stream);
      else
        r.finish->from(r.first + first + i, 0)
            .store(1, 1, [&](int64_t, int64_t) CK_INLINE_LAMBDA { return v; }, out + i, unit, r.stream);
    };
    if (rows == kBandRows && !r.stream && r.finish == nullptr) {
      CK_UNROLL for (int i = 0; i < kBandRows; ++i) row(i);
    } else {
      for (int64_t i = 0; i < rows; ++i) row(i);
    }
    const Floats any = flaw[0] + flaw[1];
    return !any_bit((Words)(any != any));
  }

  template <class Filter>
  __attribute__((noinline)) void compute_again(const Rows& r, int64_t first, int64_t rows, int64_t unit,
                                               const Filter& filter) const {
    const int64_t c = unit * 32, count = kBandRows + taps_ - 1 + kMargin;
    const bf16* in[kBandRows + kMostBandTaps - 1 + kMargin];
    bf16* out[kBandRows];
    for (int64_t q = 0; q < min(count, r.n - first + taps_ - 1 + kMargin); ++q) in[q] = r.in[first + q] + c;
    for (int64_t i = 0; i < rows; ++i) out[i] = r.out[first + i] + c;
    Epilogue<Src> finish{};
    if (r.finish != nullptr) finish = r.finish->from(r.first + first, unit);
    Convolve<Src, Filter>::rows(in, out, rows, taps_, 1, 1, filter, r.bias != nullptr ? r.bias + c : nullptr, r.stream,
                                r.finish != nullptr ? &finish : nullptr);
  }

  Machine& machine_;
  const int64_t taps_, steps_, units_, units_per_head_;
  Ring ring_;
  Scratch<float> sums_;
};

}  // namespace ck::cpu::CK_ISA
