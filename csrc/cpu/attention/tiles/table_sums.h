// Sums for the gradients of the tables of attention on tiles.
#pragma once

#include "csrc/cpu/attention/sums.h"
#include "csrc/cpu/attention/tiles/data.h"

namespace ck::cpu::CK_ISA {

// Those of query_rel or key_rel before their scale: tiles [rows / 16][tiles], turned.
struct TurnedSums {
  const HeadTable& table;
  void* out;  // nullptr: not wanted
  const Width& width;
  int64_t window, tiles;  // tiles side by side
  float factor;
  int64_t start = 0;  // within the sums of a head

  int64_t size() const { return out != nullptr ? width.sixteens * tiles * kSums : 0; }
  bool shared() const { return out != nullptr && !table.per_head; }
  float* of(float* head) const { return out != nullptr ? head + start : nullptr; }

  // heads(h): the sums of a head. A table that all heads share takes those of all.
  template <class Heads>
  void write(Range range, const Heads& heads) const {
    if (out == nullptr) return;
    if (shared()) range = add_heads(range, [&](int64_t h) { return of(heads(h)); }, size());
    Scratch<float> row(tiles * 16);
    for (int64_t h = range.first; h < range.end; ++h)
      for (int64_t t = 0; t < width.sixteens; ++t)
        for (int64_t n = 0; n < 16; ++n) {
          const int64_t channel = channel_of(t, n);
          if (channel >= width.channels) continue;
          const float* const from = of(heads(h)) + t * tiles * kSums + n * 16;
          for (int64_t w = 0; w < tiles; ++w) store_bytes(row.get() + w * 16, load_floats(from + w * kSums) * factor);
          convert_out(table.dtype, row.get(), window, out, (h * width.channels + channel) * window, 1);
        }
  }
};

// All tables, those of one head after those of another.
struct TiledTableSums {
  using L = Layout<float>;

  TableSums<float> bias, value_conv, value_conv_bias, value_conv_scale;
  TurnedSums query_rel, key_rel;
  int64_t size = 0;  // floats of a head
  bool shared = false;

  TiledTableSums(const AttentionBackward& p, const TiledData& d)
      : bias{p.bias, p.grad_bias, L::rows({1, 0}, {p.window(), 1}), 1},
        value_conv{p.value_conv, p.grad_value_conv, L::rows({p.window(), 1}, {p.channels, p.window()}), 1},
        value_conv_bias{p.value_conv_bias, p.grad_value_conv_bias, L::rows({1, 0}, {p.channels, 1}), 1},
        value_conv_scale{p.value_conv_scale, p.grad_value_conv_scale, L::rows({1, 0}, {1, 1}), 1},
        query_rel{p.query_rel,
                  p.grad_query_rel,
                  d.rank,
                  p.window(),
                  2 * ceil_div(p.window(), kBlock),
                  static_cast<float>(p.rel_scale)},
        key_rel{p.key_rel,
                p.grad_key_rel,
                d.width,
                p.window(),
                2 * ceil_div(p.window(), kBlock),
                static_cast<float>(p.scale)} {
    const auto enter = [&](auto& table) {
      table.start = size;
      size += table.size();
      shared = shared || table.shared();
    };
    for (TableSums<float>* table : {&bias, &value_conv, &value_conv_bias, &value_conv_scale}) enter(*table);
    for (TurnedSums* table : {&query_rel, &key_rel}) enter(*table);
  }

  template <class Heads>
  void write(Range range, const Heads& heads) const {
    for (int64_t h = range.first; value_conv_scale.out != nullptr && h < range.end; ++h) {
      float* const lanes = value_conv_scale.of(heads(h));
      Floats all[16] = {load_floats(lanes)};
      store_bytes(lanes, sum_each<float>(all));
    }
    each([&](const auto& table) { table.write(range, heads); });
  }

 private:
  template <class Body>
  void each(const Body& body) const {
    for (const TableSums<float>* table : {&bias, &value_conv, &value_conv_bias, &value_conv_scale}) body(*table);
    for (const TurnedSums* table : {&query_rel, &key_rel}) body(*table);
  }
};

}  // namespace ck::cpu::CK_ISA
