// Filters that all positions share, channels side by side in memory.
//
// A block owns 128 channels (kLaneRow) of the batch rows of an owner, and one group of their chunks of 32 rows (Work).
// A thread has 4 channels (a quad) of 8 consecutive rows (a run): the lanes of a warp are the channels, its 4 warps the
// runs of a chunk. With dilation d, every d-th position is a phase that is walked by itself.
//
// Shared memory holds the filters of the block's channels (FilterTable) and a ring buffer with the chunks that the
// windows of a chunk of outputs reach, and the two that are copied next (kAhead). With a gate, x and the gate arrive in
// rings of their own, and the ring has their product in float32 (InputRing).
//
// The loop over chunks
//   waits for the copies (cp.async) of the chunk that the windows reach last, and starts those of the chunk two later,
//   gates that chunk, if there is a gate,
//   slides each thread's window of 8 rows in registers over the taps: every row of the ring is read once for all taps,
//   and adds 8 x 4 products per tap (walk, in ring.cuh), adds the bias and stores the run.
#pragma once

#include "csrc/cuda/conv/walk.cuh"

namespace ck::cuda {

// Filter values of a block's channels. kShared: heads are whole quads, and a quad has one value; the odd pitch lets a
// warp write a column. Otherwise there is a value per channel.
template <bool kShared>
struct FilterTable {
  static constexpr int kPitch = kShared ? kLaneRow / kQuad + 1 : kLaneRow;
  float* values;

  CK_DEVICE void fill(const Problem& p, int64_t owner, int64_t c0) const {
    const int64_t R = p.head_channels(), end = min(c0 + kLaneRow, p.channels);
    if constexpr (kShared) {
#pragma unroll 1
      for (int64_t h = c0 / R + threadIdx.x / 32; h * R < end; h += kStreamWarps) {
        const int64_t first = (max(h * R, c0) - c0) / kQuad, last = (min((h + 1) * R, end) - c0) / kQuad;
        for_shared_taps<float>(p, FilterAt(p, owner, 0, h), [&](int64_t j, float value) {
#pragma unroll 1
          for (int64_t q = first; q < last; ++q) values[j * kPitch + q] = value;
        });
      }
    } else {
      const int64_t c = c0 + threadIdx.x;
      if (c >= end) return;
      const Sequence anywhere{0, 0, 0, kUnbounded};
      const FilterAt f(p, owner, 0, c / R);
      const Statistics<float> statistics = statistics_of<float>(p, f, 0, anywhere);
#pragma unroll 1
      for (int64_t j = 0; j < p.taps.taps; ++j)
        values[j * kPitch + threadIdx.x] = tap_of(p, f, 0, j, statistics, anywhere).value();
    }
  }

  CK_DEVICE Quad at(int64_t j, int lane) const {
    if constexpr (kShared) {
      const float w = values[j * kPitch + lane];
      return {{w, w, w, w}};
    } else {
      return load_quad(values + j * kPitch + lane * kQuad);
    }
  }
};

template <class T, bool kShared, bool kGate, bool kFinish>
CK_DEVICE void stream_outputs(const Forward& p, int64_t groups) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, K = static_cast<int>(p.taps.taps);
  const int window = static_cast<int>(stream_window(K));
  Work work(p, groups, Columns(p.channels));
  const FilterTable<kShared> table{reinterpret_cast<float*>(shared_memory())};
  const InputRing<T, kGate, kAhead> input(shared_memory() + stream_table_bytes(K, kShared), window);
  table.fill(p, work.owner, work.c0);
  const Quad bias = load_bias(p, work.c0 + lane * kQuad);

  for (Run run; work.next(run);) {
    const Reach reach(p.taps, run.phase);
    const auto nothing_else = [](int64_t) {};
    input.for_chunks(p, reach, run, window, work, p.gates<kFinish>(), nothing_else, [&](int64_t k) {
      const int64_t n = (run.start + k) * kChunk + warp * kRun;
      Quad total[kRun] = {};
      const Borders borders(p, p.taps, reach.from, n);
      walk_within(borders, input.ring, k * kChunk + warp * kRun, K, lane,
                  [&](auto fast, int j, const Quad(&rows)[kRun], int turn) {
                    const Quad w = table.at(j, lane);
#pragma unroll
                    for (int i = 0; i < kRun; ++i) {
                      if (!decltype(fast)::value && !borders.inside(i, j)) continue;
                      add_product(total[i], w, rows[(turn + i) % kRun]);
                    }
                  });
      store_output<T, kFinish>(p, total, bias, reach.from, run.b, n, work, lane);
    });
  }
}

template <class T, bool kShared, bool kGate>
CK_GLOBAL(kStreamThreads, 3)
void stream_forward(const CK_PARAM Forward p, int64_t groups) {
  stream_outputs<T, kShared, kGate, false>(p, groups);
}

template <class T, bool kShared, bool kGate>
CK_GLOBAL(kStreamThreads, 3)
void stream_forward_finished(const CK_PARAM Forward p, int64_t groups) {
  stream_outputs<T, kShared, kGate, true>(p, groups);
}

}  // namespace ck::cuda
