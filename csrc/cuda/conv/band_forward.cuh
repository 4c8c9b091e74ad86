// The forward pass of the band family.
#pragma once

#include "csrc/cuda/conv/band_filters.cuh"
#include "csrc/cuda/conv/band_slow.cuh"

namespace ck::cuda {

// Whether all sums of a tile are finite. By the warp.
template <int kMatrices>
CK_DEVICE bool all_finite(const float (&out)[kMatrices][4]) {
  float found = 0;
#pragma unroll
  for (int n = 0; n < kMatrices; ++n)
    for (int e = 0; e < 4; ++e) found += 0.0f * out[n][e];
  return __all_sync(kAllLanes, found == 0.0f) != 0;
}

// The epilogue of a tile's sums, two at a time, as the product leaves them to the lanes.
template <class T, int kMatrices, class Unit>
CK_DEVICE void finish_tile(const Forward& p, const Unit& unit, const TileRows& rows, int tile,
                           float (&out)[kMatrices][4]) {
  constexpr int kPieces = 4;  // of more at once there would be too many registers
  static_assert(kMatrices % kPieces == 0);
  const int column = unit.lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t t = rows.position(int64_t{tile} * kBandTile + half * 8 + unit.lane / 4);
    const int channels = t < p.time ? unit.channels - column : 0;
#pragma unroll
    for (int first = 0; first < kMatrices; first += kPieces)
      FinishAt<T>(p.finish, rows.b, t, unit.c0 + column + 8 * first)
          .template finish<1, kPieces>([&](int n) { return out[first + n] + 2 * half; },
                                       [&](int n) { return channels - 8 * (first + n); }, [](const Rows&) { return 8; },
                                       min(p.vector_bytes, 4));
  }
}

// Blocks: units, then groups, then owners. kOwn: each position has filters of its own.
template <class T, int kWidth, bool kGate, bool kOwn, bool kFinish>
CK_DEVICE void band_outputs(const Forward& p, int64_t groups) {
  using Ring = TileRing<T, kGate, kWidth, kBandAhead>;
  const BandShape shape(p.taps.taps, p.head_channels(), std::is_same_v<T, f16>, kGate);
  const BandUnit<kWidth> unit(p, shape, groups);
  const int lane = unit.lane, steps = shape.steps, K = static_cast<int>(p.taps.taps);
  const int bytes = band_forward_bytes(shape, kGate);
  char* const own = shared_memory() + unit.warp * bytes;
  const BandMatrix matrix(own, shape, 0);
  const Ring ring(own + shape.matrix_bytes(), steps);
  LogitTiles logits(p, shape, unit, LogitMemory::of_weight(p), shared_memory() + unit.units * bytes);
  CK_SHARED(float, all_bias, kBandWarps* kWidth);
  float* const bias = all_bias + unit.warp * kWidth;
  for (int c = lane; p.bias != nullptr && c < kWidth; c += 32)
    bias[c] = c < unit.channels ? load_as<float>(p.bias, unit.c0 + c, p.bias_dtype) : 0;
  matrix.clear(lane);
  __syncwarp();
  if (!kOwn) {
    if (unit.channels == 0) return;
    make_shared_filters(p, matrix, unit);
  }

  for_runs(p, unit, groups, 0, 0, [&](const TileRows& rows, int count) {
    TileWalk<true, Ring, T> input;
    // Rows that windows of the run reach: no more are copied.
    const int left = rows_of_run(p, rows, count);
    const int wanted = left + K - 1;
    input.start(p, {rows.b, p.taps.source(rows.first, 0), rows.dilation}, 0, wanted, unit);
    TileStores<T, kWidth> output(p.y, rows, unit);
    int logit_slot = 0, window = 0;  // of the tile that is computed
    if constexpr (kOwn) logits.start(p, LogitMemory::of_weight(p), rows, unit);
    // Tile n of z arrives with the logits of the outputs whose windows end with it.
    const auto issue = [&](int n) {
      if (n < count + steps - 1) input.copy(p, ring, unit);
      if constexpr (kOwn)
        if (const int tile = n - (steps - 1); tile >= 0 && tile < count) logits.copy(p, tile % (1 + kBandAhead));
      cp_async_commit();
    };
    sync_copies<kOwn>();  // the run before this one has been read
    int arrived = 0, turn = 0;
    for (int i = 1 - steps - kBandAhead; i < count; ++i) {
      if (i > -steps) {  // before, there is nothing to wait for
        cp_async_wait<kBandAhead - 1>();
        if constexpr (!Ring::kDirect) {
          ring.split(arrived, turn, unit, p.gates<kFinish>());
          turn = Ring::next_raw(turn);
        }
        sync_copies<kOwn>();
        arrived = ring.after(arrived, 1);
      }
      issue(i + steps - 1 + kBandAhead);
      if (i < 0) continue;
      if constexpr (kOwn) {
        if (unit.channels != 0) make_own_filters<T>(p, matrix, unit, logits, logit_slot, rows, i, [](int, float) {});
        logit_slot = logit_slot < kBandAhead ? logit_slot + 1 : 0;
        __syncwarp();
      }
      float out[2 * Ring::kGroups][4] = {};
      if (p.bias != nullptr)
#pragma unroll
        for (int n = 0; n < 2 * Ring::kGroups; ++n)
          for (int e = 0; e < 4; ++e) out[n][e] = bias[8 * n + lane % 4 * 2 + e % 2];
      band_product<Ring>(
          out, steps, lane, [&](auto& a, int term, int s) { matrix.load(a, term, s, lane); },
          [&](int s) { return ring.at(ring.after(window, s)); });
      T* const done = ring.at(window);
      __syncwarp();  // which has been read
      window = ring.after(window, 1);
      const auto whole = [&] { return kOwn || whole_tile(p, p.taps, rows, i); };
      bool fast;
      if constexpr (kFinish) {
        // Of the sums, since the epilogue can make numbers that are not finite, and finite ones of such.
        fast = all_finite(out) && whole();
        if (fast) finish_tile<T>(p, unit, rows, i, out);
        put_tile<T>(done, out, lane);
      } else {
        fast = put_tile<T>(done, out, lane) && whole();
      }
      __syncwarp();
      if (fast) {
        output.store(done, p, p.y, left - i * kBandTile, unit);
      } else {
        slow_outputs<T, kFinish>(p, unit, rows, i);
        output.skip(p, p.y);
      }
    }
  });
}

template <class T, int kWidth, bool kGate, bool kOwn>
CK_GLOBAL(32 * kBandWarps, 3)
void band_forward(const CK_PARAM Forward p, int64_t groups) {
  band_outputs<T, kWidth, kGate, kOwn, false>(p, groups);
}

// With filters of each position's own three blocks have not registers enough.
template <class T, int kWidth, bool kGate, bool kOwn>
CK_GLOBAL(32 * kBandWarps, kOwn ? 2 : 3)
void band_forward_finished(const CK_PARAM Forward p, int64_t groups) {
  band_outputs<T, kWidth, kGate, kOwn, true>(p, groups);
}

}  // namespace ck::cuda
