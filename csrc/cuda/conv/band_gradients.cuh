// Gradients of filters in the band kernels: products of pairs of rows, and the way back through dropout and softmax.
#pragma once

#include "csrc/cuda/conv/band_filters.cuh"

namespace ck::cuda {

// acc += a b, of numbers that are sums of terms.
template <int kA, int kB>
CK_DEVICE void multiply_pairs(float (&acc)[4], const uint32_t (&a)[kA][4], const uint32_t (&b)[kB][2]) {
  if constexpr (kB == 3) mma_m16n8k16<bf16>(acc, a[0], b[2]);
  if constexpr (kA > 1 && kB > 1) mma_m16n8k16<bf16>(acc, a[1], b[1]);
  if constexpr (kA > 1) mma_m16n8k16<bf16>(acc, a[1], b[0]);
  if constexpr (kB > 1) mma_m16n8k16<bf16>(acc, a[0], b[1]);
  mma_m16n8k16<bf16>(acc, a[0], b[0]);
}

// G += of the rows of d(y) at `dy` and `steps` tiles of z: tile(s). Tensor cores cut off what they add to a sum, so
// that one of many tiles would be too small: those of each tile are found by themselves. kFirst: G is that of one tile.
template <class GradRing, class Ring, bool kFirst, int kSteps, class T, class Tile>
CK_DEVICE void pair_product(float (&g)[2 * kSteps][4], int steps, const T* dy, int lane, const Tile& tile) {
  constexpr int kPitch = Ring::Unit::kPitch;
  dy += lane % 16 * kPitch + lane / 16 * 8;
  const int place = (lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 8;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if (s >= steps) break;
    const T* const z = tile(s) + place;
    float sums[2][4] = {};
#pragma unroll
    for (int c = 0; c < Ring::kGroups; ++c) {
      uint32_t a[GradRing::kParts][4], b[Ring::kParts][4], half[Ring::kParts][2];
      for (int part = 0; part < GradRing::kParts; ++part) ldmatrix_x4(a[part], dy + part * Ring::kTile + 16 * c);
      for (int part = 0; part < Ring::kParts; ++part) ldmatrix_x4(b[part], z + part * Ring::kTile + 16 * c);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        for (int part = 0; part < Ring::kParts; ++part)
          half[part][0] = b[part][2 * n], half[part][1] = b[part][2 * n + 1];
        multiply_pairs<GradRing::kParts, Ring::kParts>(sums[n], a, half);
      }
    }
    for (int n = 0; n < 2; ++n)
      for (int e = 0; e < 4; ++e) g[2 * s + n][e] = kFirst ? sums[n][e] : g[2 * s + n][e] + sums[n][e];
  }
}

// Where the taps of row r are in a strip.
CK_DEVICE int strip_row(int row, int taps) {
  return row / 2 * band_strip_pair(taps) + row % 2 * band_strip_second(taps);
}

// Puts the band of G, which has tap j of row r in column r + j + shift, into a strip.
template <int kMatrices>
CK_DEVICE void put_band(float* strip, const float (&g)[kMatrices][4], int shift, int taps, int lane) {
  CK_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half, first = lane % 4 * 2 - row - shift;
    float* const to = strip + strip_row(row, taps) + first;
    CK_UNROLL
    for (int n = 0; n < 2 * kMatrices; ++n) {
      const int at = n / 2 * 8 + n % 2;
      if (static_cast<unsigned>(first + at) < static_cast<unsigned>(taps)) to[at] = g[n / 2][2 * half + n % 2];
    }
  }
}

// Whether all that a lane has of a tile's first part is finite.
template <class Unit, class T>
CK_DEVICE bool finite_rows(const T* tile, const Unit& unit) {
  uint32_t found = 0;
  for (int turn = 0; turn < Unit::kTurns; ++turn) {
    uint32_t words[4];
    load_vector(words, tile + (unit.row + turn * Unit::kRowStep) * Unit::kPitch + unit.column);
    for (int w = 0; w < 4; ++w) found = not_finite_pair<bf16>(words[w], found);
  }
  return all_finite(found);
}

// From G of a tile, in `strip`, to the gradients of its logits: through dropout and softmax, row lane / 2 by two lanes.
// store(j, value). By the warp.
template <class Store>
CK_DEVICE void finish_own_filters(const Backward& p, const FilterAt& at, int lane, float* strip,
                                  const float* probabilities, const Store& store) {
  const int K = static_cast<int>(p.taps.taps), q = lane % 2;
  if (p.seed != nullptr)
#pragma unroll 1
    for (int j = q; j < K; j += 2) strip[j] *= dropout_factor<float>(p, at, j);
  float d[kLaneTaps], inner = 0;
  for_lane_taps(K, lane, [&](int i, int j) {
    d[i] = j < K ? strip[j] : 0.0f;
    if (j < K) inner += d[i] * probabilities[j];
  });
  inner += __shfl_xor_sync(kAllLanes, inner, 1);
  for_lane_taps(K, lane, [&](int i, int j) {
    if (j < K) store(j, p.softmax ? probabilities[j] * (d[i] - inner) : d[i]);
  });
}

}  // namespace ck::cuda
