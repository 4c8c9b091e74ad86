// The depthwise term of attention: a convolution of the values, in float32.
#pragma once

#include "csrc/cpu/attention/tables.h"
#include "csrc/cpu/attention/tiles/data.h"

namespace ck::cpu::CK_ISA {

class Depthwise {
 public:
  Depthwise(const AttentionProblem& p, const TiledData& data)
      : p_(p),
        d_(data),
        taps_(p, p.value_conv, L::rows({p.window(), p.value_conv.column}, {p.channels, p.value_conv.row}), 1),
        bias_(p, p.value_conv_bias, L::rows({1, 0}, {p.channels, p.value_conv_bias.row}), 1),
        scale_(p, p.value_conv_scale, L::rows({1, 0}, {1, 0}), 1),
        sum_(exists() ? data.width.padded : 0) {}

  bool exists() const { return p_.value_conv.data != nullptr; }

  // Finds the term of one query.
  void convolve(int64_t b, int64_t h, const QueryPosition& position) {
    taps_.choose(h);
    bias_.choose(h);
    scale_.choose(h);
    const int64_t width = round_up(p_.channels, 16);
    memset(sum_.get(), 0, static_cast<size_t>(d_.width.padded) * sizeof(float));
    if (bias_.get() != nullptr) memcpy(sum_.get(), bias_.get(), static_cast<size_t>(width) * sizeof(float));
    const Range taps = position.taps(p_);
    for (int64_t tap = taps.first; tap < taps.end; ++tap) {
      const int64_t j = position.at - p_.left + tap;
      if (!d_.is_there(b, j)) continue;
      const RowOf v(p_.v, b, j, h / p_.sharing());
      for (int64_t c = 0; c < width; c += 32) {
        const Words pairs = v.load(c, p_.channels - c);
        Narrow halves[2];
        __builtin_memcpy(halves, &pairs, 64);
        for (int64_t half = 0; half < 2 && c + half * 16 < width; ++half) {
          const Floats values = (Floats)(__builtin_convertvector(halves[half], Words) << 16);
          float* const to = sum_.get() + c + half * 16;
          store_bytes(to, fused(load_floats(taps_.get() + tap * width + c + half * 16), values, load_floats(to)));
        }
      }
    }
    if (scale_.get() != nullptr) multiply_by(sum_.get(), d_.width.padded, *scale_.get());
  }

  // Adds it to 32 channels of a result.
  CK_INLINE void add(int64_t channel, Floats& first, Floats& second) const {
    first += load_floats(sum_.get() + channel);
    second += load_floats(sum_.get() + channel + 16);
  }

 private:
  using L = Layout<float>;

  const AttentionProblem& p_;
  const TiledData& d_;
  PackedTable<float> taps_, bias_, scale_;
  Scratch<float> sum_;
};

}  // namespace ck::cpu::CK_ISA
