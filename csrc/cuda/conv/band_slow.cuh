// Tiles of the band kernels that products of matrices cannot make, tap by tap.
#pragma once

#include "csrc/cuda/conv/band.cuh"
#include "csrc/cuda/conv/finish.cuh"

namespace ck::cuda {

// Whether the windows of all rows of a tile lie within one sequence.
CK_DEVICE bool whole_tile(const Problem& p, const Taps& taps, const TileRows& rows, int tile) {
  if (p.offsets == nullptr) return true;
  const int64_t t = rows.position(int64_t{tile} * kBandTile);
  const int64_t last = t + int64_t{kBandTile - 1} * rows.dilation;
  const Sequence sequence = sequence_of(p, t);
  return max(taps.source(t, 0), int64_t{0}) >= sequence.begin &&
         min(max(last, taps.source(last, taps.taps - 1)), p.time - 1) < sequence.end;
}

// The 16 outputs of a tile tap by tap, without products of matrices. By the warp.
template <class T, bool kFinish, class Unit>
CK_DEVICE void slow_outputs(const Forward& p, const Unit& unit, const TileRows& rows, int tile) {
#pragma unroll 1
  for (int r = 0; r < kBandTile; ++r) {
    const int64_t t = rows.position(int64_t{tile} * kBandTile + r);
    if (t >= p.time) return;
    const FilterAt f(p, rows.b, t, unit.head);
    const Sequence sequence = sequence_of(p, t);
    const Statistics<float> statistics = warp_statistics<float>(p, f, t, unit.lane, sequence);
#pragma unroll 1
    for (int e = unit.lane; e < unit.channels; e += 32) {
      const int64_t c = unit.c0 + e;
      float total = p.bias == nullptr ? 0 : load_as<float>(p.bias, c, p.bias_dtype);
#pragma unroll 1
      for (int64_t j = 0; j < p.taps.taps; ++j)
        total += tap_of(p, f, t, j, statistics, sequence).value() *
                 load_input<T>(p, rows.b, p.taps.source(t, j), c, sequence, p.gates<kFinish>());
      if constexpr (kFinish) total = FinishAt<T>(p.finish, rows.b, t, c).finished(total);
      *at<T>(p.y, rows.b, t, c) = narrow<T>(total);
    }
  }
}

// d(z) of the 16 inputs of a tile tap by tap. By the warp.
template <class T, class Unit>
CK_DEVICE void slow_inputs(const Backward& p, const Unit& unit, const TileRows& rows, int tile) {
#pragma unroll 1
  for (int r = 0; r < kBandTile; ++r) {
    const int64_t s = rows.position(int64_t{tile} * kBandTile + r);
    if (s >= p.time) return;
    const Sequence sequence = sequence_of(p, s);
#pragma unroll 1
    for (int first = 0; first < unit.channels; first += 32) {
      const int64_t c = unit.c0 + first + unit.lane;
      const bool there = first + unit.lane < unit.channels;
      float dz = 0;
#pragma unroll 1
      for (int64_t j = 0; j < p.taps.taps; ++j) {
        const int64_t t = p.taps.target(s, j);
        if (!sequence.contains(t)) continue;
        const FilterAt f(p, rows.b, t, unit.head);
        const Statistics<float> statistics = warp_statistics<float>(p, f, t, unit.lane, sequence);
        if (there) dz += tap_of(p, f, t, j, statistics, sequence).value() * widen(*at<const T>(p.grad, rows.b, t, c));
      }
      if (!there) continue;
      if (s >= 0)
        store_input_gradient<T>(p, rows.b, s, c, dz);
      else if (T* const to = state_at<T>(p, p.grad_state, rows.b, s, c, sequence); to != nullptr)
        *to = narrow<T>(dz);
    }
  }
}

// Adds d(filter) of the 16 outputs of a tile, which positions share, tap by tap to `sums`. By the warp.
template <class T, class Unit>
CK_DEVICE void slow_taps(const Backward& p, const Unit& unit, const TileRows& rows, int tile, float* sums) {
#pragma unroll 1
  for (int64_t j = unit.lane; j < p.taps.taps; j += 32) {
    float total = 0;
#pragma unroll 1
    for (int r = 0; r < kBandTile; ++r) {
      const int64_t t = rows.position(int64_t{tile} * kBandTile + r), s = p.taps.source(t, j);
      if (t < 0 || t >= p.time) continue;
      const Sequence sequence = sequence_of(p, t);
#pragma unroll 1
      for (int64_t c = unit.c0; c < unit.c0 + unit.channels; ++c)
        total +=
            load_input<T>(p, rows.b, s, c, sequence, p.gate_activation) * widen(*at<const T>(p.grad, rows.b, t, c));
    }
    sums[j] += total;
  }
}

}  // namespace ck::cuda
