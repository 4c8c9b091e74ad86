// How the band kernels cut heads into units, and what they have in shared memory: for their plan, and for themselves. A
// warp has up to 64 channels of a head, a unit, 16 rows at a time.
#pragma once

#include <cstdint>

#include "csrc/common/taps.h"

namespace ck::cuda {

constexpr int kBandTile = 16;                      // rows of a product
constexpr int kBandWarps = 4;                      // units of a block, at most
constexpr int kBandAhead = 2, kBandGradAhead = 1;  // tiles that are copied while one is computed
constexpr int64_t kBandStatic = 2 << 10;           // bytes of static memory

constexpr int64_t kBandMaxTaps = 65;
// Up to this many taps a window is three tiles, and sums for d(filter) take fewer registers.
constexpr int64_t kBandShort = 33;

// Tiles that the window of a tile reaches.
CK_HD constexpr int band_steps(int64_t taps) { return static_cast<int>((taps + 2 * kBandTile - 2) / kBandTile); }
constexpr int kBandSteps = band_steps(kBandMaxTaps), kBandShortSteps = band_steps(kBandShort);

// Terms of bfloat16 that a number is made of: one of its own, two of float16, three of float32 (a gated input).
CK_HD constexpr int band_parts(bool float16, bool gate) { return gate ? 3 : float16 ? 2 : 1; }

// Words from one row of a tile's filters to the next, with the three terms of each side by side. Rows that a warp
// writes lie in different banks, and so do eight that it reads 16 bytes of.
CK_HD constexpr int band_matrix_pitch(int steps) { return (24 * steps + 19) / 32 * 32 + 12; }

// From row to row of a tile, in elements: eight rows begin at different multiples of 16 bytes, modulo 128.
CK_HD constexpr int band_pitch(int width) { return width + 8; }

// The channels of a head as units.
struct BandShape {
  int steps, parts;
  int pieces;  // of a head
  int width;   // of a row in shared memory, in channels: 32 or 64

  CK_HD BandShape(int64_t taps, int64_t R, bool float16, bool gate)
      : steps(band_steps(taps)), parts(band_parts(float16, gate)) {
    const int r = static_cast<int>(R), most = parts == 1 ? 64 : 32;
    pieces = (r + most - 1) / most;
    width = (r + pieces - 1) / pieces <= 32 ? 32 : 64;
  }

  // Channels of a piece, but for the last one.
  CK_HD int piece(int64_t R) const { return ((static_cast<int>(R) + pieces - 1) / pieces + 7) / 8 * 8; }
  CK_HD int matrix_bytes() const { return kBandTile * band_matrix_pitch(steps) * 4; }
};

// A ring of tiles in shared memory that `tiles` are read of at a time: its slots, and bytes. Copies arrive there as
// they are, `ahead` tiles early; what has more than one part arrives in `raw` slots for x and the gate, and is split
// from there.
CK_HD constexpr int band_slots(int parts, int tiles, int ahead) { return parts == 1 ? tiles + ahead : tiles; }
CK_HD constexpr int band_ring_bytes(int parts, int tensors, int tiles, int width, int ahead, int raw) {
  return (band_slots(parts, tiles, ahead) * parts + (parts == 1 ? 0 : raw * tensors)) * kBandTile * band_pitch(width) *
         2;
}

// Gradients of the filters of 16 rows, which lie in pairs, in words: those that a warp writes together are in different
// banks, and so are those that it reads. The second row of a pair; the next pair.
CK_HD constexpr int band_strip_second(int64_t taps) { return static_cast<int>(taps + 15) / 32 * 32 + 16; }
CK_HD constexpr int band_strip_pair(int64_t taps) {
  return (band_strip_second(taps) + static_cast<int>(taps) + 21) / 32 * 32 + 10;
}
CK_HD constexpr int band_strip_bytes(int64_t taps) { return kBandTile / 2 * band_strip_pair(taps) * 4; }
// Words from row to row of their probabilities.
CK_HD constexpr int band_probability_pitch(int64_t taps) { return static_cast<int>(taps + 1) / 4 * 4 + 2; }

// Whether a lane has its sums for d(bias) in shared memory, where registers are short.
CK_HD constexpr bool band_bias_in_memory(bool own, int width) { return own && width == 32; }

// Bytes of a warp.
CK_HD int band_forward_bytes(const BandShape& shape, bool gate) {
  return shape.matrix_bytes() +
         band_ring_bytes(shape.parts, gate ? 2 : 1, shape.steps, shape.width, kBandAhead, kBandAhead);
}
CK_HD int band_backward_bytes(const BandShape& shape, bool float16, bool gate, bool own, int64_t taps) {
  const int rings =
      band_ring_bytes(band_parts(float16, false), 1, shape.steps, shape.width, kBandGradAhead, kBandGradAhead) +
      band_ring_bytes(shape.parts, gate ? 2 : 1, shape.steps, shape.width, kBandGradAhead, kBandGradAhead + 1);
  if (!own) return shape.matrix_bytes() + rings;
  return shape.steps * (shape.matrix_bytes() + kBandTile * band_probability_pitch(taps) * 4) + rings +
         band_strip_bytes(taps) + (band_bias_in_memory(own, shape.width) ? 32 * 8 * 4 : 0);
}

// Bytes of a row of logits of `heads` heads in shared memory: an odd multiple of 8, for 16 rows in different banks.
CK_HD int band_logit_pitch(int64_t taps, int heads, int64_t size) {
  return static_cast<int>((taps * heads * size + 7) / 8 / 2 * 16 + 8);
}
// Heads that units of a block have.
CK_HD int band_heads(int pieces, int units) {
  return pieces == 1 ? units : (units + pieces - 1) / pieces + (units % pieces == 0 || pieces % units == 0 ? 0 : 1);
}

// Whether a block has whole heads, and so adds up what their pieces give for gradients of dynamic filters.
CK_HD bool band_whole_heads(int pieces, int units) { return units % pieces == 0; }

}  // namespace ck::cuda
