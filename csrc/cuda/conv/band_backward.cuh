// The backward pass of the band family: all gradients from one walk over x and d(y). Row q of a window of d(y) reads
// input m of a tile by tap q - m of the transposed relation, so that the filter's gradient lies along the diagonals of
//
//   G[m, q] = sum over c of z[m, c] dy[q, c],
//
// which stay in registers from the first tile to the last.
#pragma once

#include "csrc/cuda/conv/band.cuh"

namespace ck::cuda {

// G += of the 16 rows of z at `z`, whose parts lie `apart`, the window of d(y) from tile `first` on, and 32 channels.
template <class T, int kZParts, int kParts, int kSteps>
CK_DEVICE void pair_product(float (&g)[2 * kSteps][4], int z, int apart, int steps, const BandWindow<T>& window,
                            int first, int column, int lane) {
#pragma unroll 1
  for (int c = 0; c < kBandUnit; c += 16) {
    uint32_t a[kZParts][4];
    for (int part = 0; part < kZParts; ++part)
      ldmatrix_x4(a[part], BandFeed<T, false, true>::at(z + part * apart + lane % 16 * window.pitch + column + c +
                                                        lane / 16 * 8));
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (s >= steps) break;
      uint32_t b[kParts][4], half[kParts][2];
      for (int part = 0; part < kParts; ++part)
        ldmatrix_x4(b[part], window.row(first + s, part, lane % 8 + lane / 16 * 8) + column + c + lane / 8 % 2 * 8);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        for (int part = 0; part < kParts; ++part) half[part][0] = b[part][2 * n], half[part][1] = b[part][2 * n + 1];
        multiply<kZParts, kParts>(g[2 * s + n], g[2 * s + n], a, half);
      }
    }
  }
}

// The gradients of the 16 inputs from position `first` on and of `channels` channels from c on, at most 32, tap by tap.
// `filter` and `taps` as in the relation; `sums`: of this warp, a number per tap.
template <class T, int kSteps>
CK_DEVICE void slow_gradients(const Backward& p, const Taps& taps, const BandFilter<kSteps>& filter, float* sums,
                              int64_t b, int64_t first, int64_t c, int channels, int lane) {
  const int64_t end = min(first + kBandTile * taps.dilation, p.time);
  if (lane < channels)
#pragma unroll 1
    for (int64_t s = first; s < end; s += taps.dilation) {
      const Sequence sequence = sequence_of(p, s);
      float dz = 0;
#pragma unroll 1
      for (int64_t j = 0; j < taps.taps; ++j) {
        const int64_t t = taps.source(s, j);
        if (sequence.contains(t)) dz += filter.tap(j) * widen(*at<const T>(p.grad, b, t, c + lane));
      }
      if (s >= 0)
        store_input_gradient<T>(p, b, s, c + lane, dz);
      else if (p.grad_state != nullptr)
        *state_at<T>(p, p.grad_state, b, s, c + lane, sequence) = narrow<T>(dz);
    }
  if (p.grad_weight == nullptr) return;
#pragma unroll 1
  for (int64_t j = lane; j < taps.taps; j += 32) {
    float total = 0;
#pragma unroll 1
    for (int64_t s = first; s < end; s += taps.dilation) {
      const int64_t t = taps.source(s, j);
      const Sequence sequence = sequence_of(p, s);
      if (!sequence.contains(t)) continue;
#pragma unroll 1
      for (int e = 0; e < channels; ++e)
        total += load_input<T>(p, b, s, c + e, sequence) * widen(*at<const T>(p.grad, b, t, c + e));
    }
    sums[j] += total;
  }
}

// Blocks as in band_forward.
template <class T, int kSteps, bool kGate>
CK_GLOBAL(kBandThreads, 3)
void band_backward(const CK_PARAM Backward p) {
  using GradFeed = BandFeed<T, false, true>;
  using Feed = BandFeed<T, kGate, false>;
  constexpr int kRow = kBandTile * kSteps;  // of G, and more than there are taps
  CK_SHARED(BandFilter<kSteps>, filter, 1);
  CK_SHARED(float, slow_sums, kBandWarps* kRow);
  CK_SHARED(float, bias_sums, 8 * kBandThreads);  // each thread's, of the channels of its vectors
  const Taps taps = p.taps.transposed();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, K = static_cast<int>(taps.taps);
  const BandBlock block(p, Feed::kParts, p.groups);
  const bool need_input = p.grad_x.data != nullptr || p.grad_gate.data != nullptr || p.grad_state != nullptr;
  const bool need_weight = p.grad_weight != nullptr, need_bias = p.grad_bias != nullptr;
  for (int i = threadIdx.x; i < kBandWarps * kRow; i += kBandThreads) slow_sums[i] = 0;
  for (int e = 0; e < 8; ++e) bias_sums[e * kBandThreads + threadIdx.x] = 0;
  const bool bad_filter = filter->fill(p, block, true);
  const GradFeed grad(0, block);
  const Feed feed(grad.end(), block);
  const int steps = (K + 2 * kBandTile - 2) / kBandTile;
  float g[2 * kSteps][4] = {};

  const int64_t before = p.state == nullptr ? 0 : taps.span();
  for_runs(p, taps, before, block, p.groups, [&](int64_t b, int64_t s0, int count, bool last) {
    // Chunk i of d(y) comes with chunk i - 1 of x, which has no halo.
    const auto stage = [&](int i) {
      if (i > count) return;
      grad.template stage<false>(i, 0, p, p.grad, b, taps.source(s0, i * kBandRows), taps.dilation,
                                 (count - i) * kBandRows + K - 1, block);
      if (i == 0 || !(need_weight || kGate)) return;
      for (int tensor = 0; tensor < Feed::kTensors; ++tensor)
        feed.template stage<true>(i - 1, tensor, p, tensor == 0 ? p.x : p.gate, b,
                                  s0 + (i - 1) * kBandRows * taps.dilation, taps.dilation, kBandRows, block);
    };
    const auto accept = [&](int i) {
      float sum[8] = {};
      bool bad = grad.accept(i, [&](const float (&dy)[8]) {
        for (int e = 0; e < 8; ++e) sum[e] += dy[e];
      });
      // The chunk after the last is the next run's first, unless there is none.
      if (need_bias && (i < count || last))
        for (int e = 0; e < 8; ++e) bias_sums[e * kBandThreads + threadIdx.x] += sum[e];
      if (i > 0 && need_weight) bad = feed.accept(i - 1, [](const float (&)[8]) {}) || bad;
      return bad;
    };
    walk_chunks(count, stage, accept, [&](int i, bool slow) {
      const int64_t first = s0 + (i * kBandRows + warp * kBandTile) * taps.dilation;
      if (first >= p.time) return;
      slow = slow || bad_filter || !whole_windows(p, taps, first);
      const BandWindow<T> window(grad, i);
      const int own = warp * kBandTile * feed.pitch;
#pragma unroll 1
      for (int column = 0; column < block.channels; column += kBandUnit) {
        const int channels = block.channels - column;
        const int64_t c = block.c0 + column;
        if (slow) {
          slow_gradients<T>(with_known_gate<kGate>(p), taps, *filter, slow_sums + warp * kRow, b, first, c,
                            min(channels, kBandUnit), lane);
          continue;
        }
        if (need_weight)
          pair_product<T, Feed::kParts, GradFeed::kParts, kSteps>(g, feed.parts(i) + own, feed.chunk, steps, window,
                                                                  warp, column, lane);
        if (!need_input) continue;
        float dz[4][4] = {};
        band_product<T, GradFeed::kParts>(dz, *filter, steps, window, warp, column, lane);
        const auto position = [&](int half) { return first + (lane / 4 + 8 * half) * taps.dilation; };
        if (p.mask != nullptr)
          for (int half = 0; half < 2; ++half)
            if (const int64_t s = position(half); s >= 0 && s < p.time && masked(p, b, s))
              for (int j = 0; j < 4; ++j) dz[j][2 * half] = dz[j][2 * half + 1] = 0;
        const auto row_of = [&](const Rows& rows, int half) {
          const int64_t s = position(half);
          return rows.data != nullptr && s < p.time ? at<T>(rows, b, s, c) : nullptr;
        };
        // Of x or the gate, where element e of matrix j of dz is.
        const auto raw = [&](int tensor, int j, int e) {
          const int row = own + (lane / 4 + e / 2 * 8) * feed.pitch;
          return widen(*Feed::at(feed.raw(i, tensor) + row + column + 8 * j + lane % 4 * 2 + e % 2));
        };
        store_product<T>(
            channels, lane, p.vector_bytes,
            [&](int j, int e) { return kGate ? dz[j][e] * sigmoid<T>(raw(1, j, e)) : dz[j][e]; },
            [&](int half) {
              const int64_t s = position(half);
              return s >= 0 ? row_of(p.grad_x, half)
                            : state_at<T>(p, p.grad_state, b, s, c, {0, 0, p.time, kUnbounded});
            });
        if (kGate && p.grad_gate.data != nullptr)
          store_product<T>(
              channels, lane, p.vector_bytes,
              [&](int j, int e) {
                const float open = sigmoid<T>(raw(1, j, e));
                return dz[j][e] * raw(0, j, e) * open * (1 - open);
              },
              [&](int half) { return row_of(p.grad_gate, half); });
      }
    });
  });

  // Computed again: kept over the whole walk it would take registers.
  const BandBlock place(p, Feed::kParts, p.groups);
  const int64_t partial = int64_t{place.owner} * p.groups + place.group;
  float* const products = reinterpret_cast<float*>(shared_memory());
  if (need_weight) {
#pragma unroll
    for (int k = 0; k < 2 * kSteps; ++k)
      for (int e = 0; e < 4; ++e)
        products[(warp * kBandTile + lane / 4 + e / 2 * 8) * kRow + 8 * k + lane % 4 * 2 + e % 2] = g[k][e];
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < K) {
      const int j = threadIdx.x;
      float total = 0;
      for (int w = 0; w < kBandWarps; ++w) {
        total += slow_sums[w * kRow + j];
        for (int m = 0; m < kBandTile; ++m) total += products[(w * kBandTile + m) * kRow + m + j];
      }
      static_cast<float*>(p.partial_weight)[(partial * place.columns + place.column) * K + K - 1 - j] = total;
    }
  }
  if (need_bias && static_cast<int>(threadIdx.x) < place.channels) {
    const int vectors = 1 << place.log_vectors;
    const float* const sums = bias_sums + threadIdx.x % 8 * kBandThreads + threadIdx.x / 8;
    float total = 0;
    for (int i = 0; i < kBandThreads; i += vectors) total += sums[i];
    static_cast<float*>(p.partial_bias)[partial * p.channels + place.c0 + threadIdx.x] = total;
  }
}

}  // namespace ck::cuda
