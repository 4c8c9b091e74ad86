// The operands of products on tiles, and the products. Everything is made of blocks of 32 rows and 32 columns.
//
//   natural       32 rows of channels as they are; a left operand whose product sums over channels
//   by channels   32 rows as a right operand whose product sums over channels: tiles [2 halves of 16 rows][channels /
//   32],
//                 a row of a tile holds a pair of channels of 16 rows
//   by rows       32 rows as a right operand whose product sums over them: tiles [channels / 16], row x of a tile holds
//                 16 channels of rows x and x + 16
//   turned        32 rows as a left operand whose product sums over them: tiles [channels / 16], each turned
//
// Pairs of rows x and x + 16 need no shuffle where weights become operands. Two tiles by rows side by side share 32
// channels, whose order is that of channel_of.
#pragma once

#include "csrc/common/attention.h"
#include "csrc/cpu/tile_vectors.h"

namespace ck::cpu::CK_ISA {

constexpr int64_t kBlock = 32;
constexpr int64_t kSums = 256, kFactors = 512;  // numbers of a tile: float32, bfloat16

// Channels in whole tiles.
struct Width {
  int64_t channels, padded, pairs, sixteens;  // pairs of a row of a tile; tiles of 16

  explicit Width(int64_t n) : channels(n), padded(round_up(n, kBlock)), pairs(padded / kBlock), sixteens(padded / 16) {}
  int64_t factors() const { return kBlock * padded; }  // of an operand of 32 rows
};

// The channel that column n (row n, turned) of a tile by rows has.
CK_INLINE int64_t channel_of(int64_t tile, int64_t n) { return tile / 2 * 32 + n / 4 * 8 + tile % 2 * 4 + n % 4; }

// One row of a tensor.
struct RowOf {
  bf16* data;
  int64_t channel;

  RowOf(const HeadRows& t, int64_t b, int64_t i, int64_t h)
      : data(static_cast<bf16*>(t.data) + b * t.batch + i * t.time + h * t.head), channel(t.channel) {}

  // 32 channels, of which n are there.
  CK_INLINE Words load(int64_t first, int64_t n) const {
    if (channel == 1) return load_part(data + first, n);
    bf16 copy[32] = {};
    for (int64_t c = 0; c < min(n, 32); ++c) copy[c] = data[(first + c) * channel];
    return load_words(copy);
  }
  CK_INLINE void store(int64_t first, int64_t n, Halves v) const {
    if (channel == 1) return store_part(data + first, v, n);
    for (int64_t c = 0; c < min(n, 32); ++c) data[(first + c) * channel].bits = v[c];
  }
};

// 32 rows of a tensor from `first` on, natural; zeros where a bit of `there` is not set.
inline void read_rows(const HeadRows& t, const Width& width, int64_t b, int64_t h, int64_t first, uint32_t there,
                      bf16* to) {
  if (there == ~0u && t.channel == 1 && width.channels == width.padded) {
    const bf16* from = RowOf(t, b, first, h).data;
    for (int64_t i = 0; i < kBlock; ++i, from += t.time, to += width.padded)
      for (int64_t c = 0; c < width.padded; c += 32) store_bytes(to + c, load_words(from + c));
    return;
  }
  for (int64_t i = 0; i < kBlock; ++i)
    for (int64_t c = 0; c < width.padded; c += 32)
      store_bytes(to + i * width.padded + c,
                  there >> i & 1 ? RowOf(t, b, first + i, h).load(c, width.channels - c) : Words{});
}

// From rows at a distance of `pitch`. squares: of the lengths of 16 rows each, if wanted.
inline void pack_by_channels(const bf16* rows, int64_t pitch, const Width& width, bf16* to, Floats* squares = nullptr) {
  for (int64_t half = 0; half < 2; ++half) {
    Floats low = {}, high = {};
    for (int64_t c = 0; c < width.pairs; ++c) {
      Words turned[16];
      transpose_words(rows + half * 16 * pitch + c * 32, pitch * 2, turned);
      for (int64_t i = 0; i < 16; ++i) {
        store_bytes(to + (half * width.pairs + c) * kFactors + i * 32, turned[i]);
        if (squares == nullptr) continue;
        low = fused(low_halves(turned[i]), low_halves(turned[i]), low);
        high = fused(high_halves(turned[i]), high_halves(turned[i]), high);
      }
    }
    if (squares != nullptr) squares[half] = low + high;
  }
}

inline void pack_by_rows(const bf16* rows, int64_t pitch, const Width& width, bf16* to) {
  for (int64_t c = 0; c < width.pairs; ++c)
    for (int64_t x = 0; x < 16; ++x) {
      Words low, high;
      interleave_halves(load_words(rows + x * pitch + c * 32), load_words(rows + (x + 16) * pitch + c * 32), low, high);
      store_bytes(to + 2 * c * kFactors + x * 32, low);
      store_bytes(to + (2 * c + 1) * kFactors + x * 32, high);
    }
}

// From what pack_by_rows left.
inline void pack_turned(const bf16* by_rows, const Width& width, bf16* to) {
  for (int64_t t = 0; t < width.sixteens; ++t) {
    Words turned[16];
    transpose_words(by_rows + t * kFactors, 64, turned);
    for (int64_t i = 0; i < 16; ++i) store_bytes(to + t * kFactors + i * 32, turned[i]);
  }
}

// Where row `row` of 32 and a channel are in an operand by rows.
CK_INLINE int64_t place_by_rows(int64_t row, int64_t tile, int64_t column) {
  return tile * kFactors + row % 16 * 32 + 2 * column + row / 16;
}

// Those of 32 rows at a distance of `pitch` and of `least`, lane by lane, as of least_magnitude.
inline Halves least_magnitudes(const bf16* rows, int64_t pitch, const Width& width, Halves least) {
  for (int64_t i = 0; i < kBlock; ++i)
    for (int64_t c = 0; c < width.padded; c += 32) least = least_magnitude(load_words(rows + i * pitch + c), least);
  return least;
}

// Whether natural rows hold a NaN or an infinity.
inline bool any_nonfinite(const bf16* numbers, int64_t n) {
  Halves found = {};
  for (int64_t c = 0; c < n; c += 32) found |= (Halves)((load_bytes<Halves>(numbers + c) & 0x7f80) == 0x7f80);
  return any_bit((Words)found);
}
// Bits of those that do.
inline uint32_t nonfinite_rows(const bf16* rows, const Width& width) {
  uint32_t bits = 0;
  if (any_nonfinite(rows, width.factors()))
    for (int64_t i = 0; i < kBlock; ++i) bits |= (any_nonfinite(rows + i * width.padded, width.padded) ? 1u : 0u) << i;
  return bits;
}

// Zeros in place of natural rows whose bits are set.
inline void clear_rows(uint32_t bits, const Width& width, bf16* rows) {
  for (int64_t i = 0; i < kBlock; ++i)
    if (bits >> i & 1)
      memset(static_cast<void*>(rows + i * width.padded), 0, static_cast<size_t>(width.padded) * sizeof(bf16));
}

// Squares of the lengths of 16 natural rows.
inline Floats squares_of(const bf16* rows, const Width& width) {
  Floats sum[16];
  for (int64_t i = 0; i < 16; ++i) {
    sum[i] = Floats{};
    for (int64_t c = 0; c < width.padded; c += 32) {
      const Words pairs = load_words(rows + i * width.padded + c);
      sum[i] = fused(low_halves(pairs), low_halves(pairs), sum[i]);
      sum[i] = fused(high_halves(pairs), high_halves(pairs), sum[i]);
    }
  }
  return sum_each<float>(sum);
}

// Two tiles one below the other, or side by side; the next step of a product is `step` further. Left operands may have
// rows at any distance.
struct LeftTiles {
  const bf16 *upper, *lower;
  int64_t row_bytes, step;
};
struct RightTiles {
  const bf16 *first, *second;
  int64_t step;
};
// Sums, tile (row, column).
struct SumTiles {
  float *upper_first, *upper_second, *lower_first, *lower_second;
};

// c = or += the product of `steps` pairs of tiles.
template <class Machine>
CK_INLINE void multiply_block(Machine& m, bool begins, int64_t steps, LeftTiles a, RightTiles b, SumTiles c) {
  if (begins) {
    m.template zero<0>();
    m.template zero<1>();
    m.template zero<2>();
    m.template zero<3>();
  } else {
    m.template load<0>(c.upper_first, 64);
    m.template load<1>(c.upper_second, 64);
    m.template load<2>(c.lower_first, 64);
    m.template load<3>(c.lower_second, 64);
  }
  for (int64_t s = 0; s < steps; ++s) {
    m.template stream<6>(b.first + s * b.step, 64);
    m.template load<4>(a.upper + s * a.step, a.row_bytes);
    m.template dot<0, 4, 6>();
    m.template load<5>(a.lower + s * a.step, a.row_bytes);
    m.template dot<2, 5, 6>();
    m.template stream<7>(b.second + s * b.step, 64);
    m.template dot<1, 4, 7>();
    m.template dot<3, 5, 7>();
  }
  m.template store<0>(c.upper_first, 64);
  m.template store<1>(c.upper_second, 64);
  m.template store<2>(c.lower_first, 64);
  m.template store<3>(c.lower_second, 64);
}

// 32 natural rows times 16 rows by channels; the former are in tiles 4 to 7, stores run beside products.
template <class Machine>
CK_INLINE void multiply_sixteen(Machine& m, int64_t pairs, const bf16* k, float* to) {
  m.template zero<0>();
  m.template stream<2>(k, 64);
  m.template dot<0, 4, 2>();
  m.template zero<1>();
  m.template dot<1, 6, 2>();
  if (pairs > 1) {
    m.template stream<3>(k + kFactors, 64);
    m.template dot<0, 5, 3>();
    m.template store<0>(to, 64);
    m.template dot<1, 7, 3>();
    m.template store<1>(to + kSums, 64);
  } else {
    m.template store<0>(to, 64);
    m.template store<1>(to + kSums, 64);
  }
}

// Sums over channels of 32 natural rows and of `blocks` times 32 rows by channels: for each of these [2 halves of
// them][32 rows][16], the next block `step` floats further.
template <class Machine>
inline void multiply_channels(Machine& m, const Width& width, const bf16* rows, const bf16* k, int64_t blocks,
                              float* to, int64_t step) {
  const int64_t pairs = width.pairs, bytes = width.padded * 2;
  const bf16* const lower = rows + 16 * width.padded;
  if (pairs <= 2) {
    m.template load<4>(rows, bytes);
    m.template load<6>(lower, bytes);
    if (pairs > 1) {
      m.template load<5>(rows + 32, bytes);
      m.template load<7>(lower + 32, bytes);
    }
    for (int64_t n = 0; n < blocks; ++n, to += step)
      for (int64_t half = 0; half < 2; ++half, k += pairs * kFactors)
        multiply_sixteen(m, pairs, k, to + half * 2 * kSums);
    return;
  }
  for (int64_t n = 0; n < blocks; ++n, to += step, k += width.factors())
    multiply_block(m, true, pairs, {rows, lower, bytes, 32}, {k, k + pairs * kFactors, kFactors},
                   {to, to + 2 * kSums, to + kSums, to + 3 * kSums});
}

}  // namespace ck::cpu::CK_ISA
