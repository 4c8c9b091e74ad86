// The forward pass of the band family.
#pragma once

#include "csrc/cuda/conv/band_filters.cuh"
#include "csrc/cuda/conv/band_slow.cuh"

namespace ck::cuda {

// Blocks: units, then groups, then owners. kOwn: each position has filters of its own.
template <class T, int kWidth, bool kGate, bool kOwn>
CK_GLOBAL(32 * kBandWarps, 3)
void band_forward(const CK_PARAM Forward p, int64_t groups) {
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
          ring.split(arrived, turn, unit);
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
      const bool fast = put_tile<T>(done, out, lane) && (kOwn || whole_tile(p, p.taps, rows, i));
      __syncwarp();
      if (fast) {
        output.store(done, p, p.y, left - i * kBandTile, unit);
      } else {
        slow_outputs<T>(p, unit, rows, i);
        output.skip(p, p.y);
      }
    }
  });
}

}  // namespace ck::cuda
