// The depthwise term of attention, a convolution of the values, in float32: the term of a query, and its gradients.
#pragma once

#include "csrc/cpu/attention/tables.h"
#include "csrc/cpu/attention/tiles/data.h"

namespace ck::cpu::CK_ISA {

class Depthwise {
 public:
  // Where the gradients of one head are summed; nullptr: not wanted. values: natural rows of all keys.
  struct Sums {
    float *taps, *bias, *scale, *values;
  };

  Depthwise(const AttentionProblem& p, const TiledData& data)
      : p_(p),
        d_(data),
        taps_(p, p.value_conv, L::rows({p.window(), p.value_conv.column}, {p.channels, p.value_conv.row}), 1),
        bias_(p, p.value_conv_bias, L::rows({1, 0}, {p.channels, p.value_conv_bias.row}), 1),
        scale_(p, p.value_conv_scale, L::rows({1, 0}, {1, 0}), 1),
        sum_(exists() ? data.width.padded : 0),
        grad_(exists() ? data.width.padded : 0) {}

  bool exists() const { return p_.value_conv.data != nullptr; }

  // Finds the term of one query.
  void convolve(int64_t b, int64_t h, const QueryPosition& position) {
    choose(h);
    sum_taps(b, h, position);
    multiply_by(sum_.get(), d_.width.padded, scale());
  }
  // Adds it to 32 channels of a result.
  CK_INLINE void add(int64_t channel, Floats& first, Floats& second) const {
    first += load_floats(sum_.get() + channel);
    second += load_floats(sum_.get() + channel + 16);
  }

  // Adds the gradients that follow from that of one result.
  void differentiate(int64_t b, int64_t h, const QueryPosition& position, RowOf grad, const Sums& to) {
    choose(h);
    for (int64_t c = 0; c < d_.width.padded; c += 32) {
      Floats first, second;
      widen(grad.load(c, p_.channels - c), first, second);
      store_bytes(grad_.get() + c, first);
      store_bytes(grad_.get() + c + 16, second);
    }
    if (to.scale != nullptr) {
      sum_taps(b, h, position);
      Floats product = load_floats(to.scale);  // its lanes are added at the end
      for (int64_t c = 0; c < d_.width.padded; c += 16)
        product = fused(load_floats(grad_.get() + c), load_floats(sum_.get() + c), product);
      store_bytes(to.scale, product);
    }
    multiply_by(grad_.get(), d_.width.padded, scale());
    if (to.bias != nullptr) add_to(to.bias, grad_.get(), row());
    each_tap(b, h, position, [&](int64_t tap, int64_t j, int64_t c, Floats value) {
      const Floats g = load_floats(grad_.get() + c);
      if (to.taps != nullptr) accumulate(to.taps + tap * row() + c, g, value);
      if (to.values != nullptr)
        accumulate(to.values + j * d_.width.padded + c, g, load_floats(taps_.get() + tap * row() + c));
    });
  }

 private:
  using L = Layout<float>;

  int64_t row() const { return round_up(p_.channels, 16); }
  float scale() const { return scale_.get() == nullptr ? 1.0f : *scale_.get(); }

  void choose(int64_t h) {
    taps_.choose(h);
    bias_.choose(h);
    scale_.choose(h);
  }

  static CK_INLINE void accumulate(float* to, Floats a, Floats b) { store_bytes(to, fused(a, b, load_floats(to))); }

  // Calls body(tap, key, channel, 16 values from there on) for the values that a query reads.
  template <class Body>
  void each_tap(int64_t b, int64_t h, const QueryPosition& position, const Body& body) const {
    const Range taps = position.taps(p_);
    for (int64_t tap = taps.first; tap < taps.end; ++tap) {
      const int64_t j = position.at - p_.left + tap;
      if (!d_.is_there(b, j)) continue;
      const RowOf v(p_.v, b, j, h / p_.sharing());
      for (int64_t c = 0; c < row(); c += 32) {
        Floats value[2];
        widen(v.load(c, p_.channels - c), value[0], value[1]);
        for (int64_t half = 0; half < 2 && c + half * 16 < row(); ++half) body(tap, j, c + half * 16, value[half]);
      }
    }
  }

  // The term before its scale.
  void sum_taps(int64_t b, int64_t h, const QueryPosition& position) {
    clear(sum_.get(), d_.width.padded);
    if (bias_.get() != nullptr) memcpy(sum_.get(), bias_.get(), static_cast<size_t>(row()) * sizeof(float));
    each_tap(b, h, position, [&](int64_t tap, int64_t, int64_t c, Floats value) {
      accumulate(sum_.get() + c, load_floats(taps_.get() + tap * row() + c), value);
    });
  }

  const AttentionProblem& p_;
  const TiledData& d_;
  PackedTable<float> taps_, bias_, scale_;
  Scratch<float> sum_, grad_;
};

}  // namespace ck::cpu::CK_ISA
