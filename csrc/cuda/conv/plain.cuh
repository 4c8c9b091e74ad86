// The kernels for every problem: any strides, types, number of taps and combination of arguments. The faster families
// serve what they can, this one the rest; float64 always.
#pragma once

#include "csrc/cuda/conv/filters.cuh"
#include "csrc/cuda/conv/finish.cuh"
#include "csrc/cuda/conv/runs.h"

namespace ck::cuda {

constexpr int kPlainThreads = 256, kPlainWarps = kPlainThreads / 32;
// Of a multiprocessor, at the same time: float64 takes two registers for a number.
template <class T>
constexpr int kPlainBlocks = sizeof(T) == 8 ? 1 : 2;
constexpr int kPlainRuns = 4;  // that a warp computes with filters that were made once

// Pieces of work are numbered along one axis of the grid, which may be shorter than they are many.
CK_DEVICE int64_t first_item() { return blockIdx.x; }
CK_DEVICE int64_t item_stride() { return gridDim.x; }

// A run's first position and, if all its rows exist in one sequence, that sequence.
struct PlainRows {
  int64_t first, last;
  Sequence sequence;
  bool whole;

  CK_DEVICE PlainRows(const Problem& p, int64_t first)
      : first(first),
        last(first + (kPlainRun - 1) * p.taps.dilation),
        sequence(sequence_of(p, first)),
        whole(last < sequence.end) {}

  // Calls use(position) for the rows that exist, one after the other: of all at once there would be much code.
  template <class Use>
  CK_DEVICE void for_each(const Problem& p, const Use& use) const {
#pragma unroll 1
    for (int64_t t = first; t <= min(last, p.time - 1); t += p.taps.dilation) use(t);
  }
};

// Adds the products of a filter, whose values lie `step` apart, and the windows of a run's rows. load(z, m, count):
// z[k] is what tap m + k of the first row reads, and tap m + k - i of row i; the first `count` are wanted.
template <class C, class Load>
CK_DEVICE void add_windows(C (&total)[kPlainRun], const C* filter, int64_t step, int64_t taps, const Load& load) {
  C now[kPlainRun], next[kPlainRun];
  load(now, 0, taps + kPlainRun - 1);
#pragma unroll 1
  for (int64_t j = 0; j < taps; j += kPlainRun) {
    load(next, j + kPlainRun, taps - 1 - j);
#pragma unroll
    for (int u = 0; u < kPlainRun; ++u) {
      if (j + u >= taps) break;
#pragma unroll
      for (int i = 0; i < kPlainRun; ++i)
        total[i] += *filter * (u + i < kPlainRun ? now[u + i] : next[u + i - kPlainRun]);
      filter += step;
    }
#pragma unroll
    for (int i = 0; i < kPlainRun; ++i) now[i] = next[i];
  }
}

// Filters that positions share, of the heads of a block's 32 channels, in shared memory: [head][tap].
template <class C>
struct PlainFilters {
  C* values;
  bool used;  // or there are none
  int64_t pitch;

  CK_DEVICE PlainFilters(const Problem& p, bool used)
      : values(reinterpret_cast<C*>(shared_memory())), used(used), pitch(plain_pitch(p.taps.taps)) {}

  // By the block.
  CK_DEVICE void fill(const Problem& p, int64_t b, int64_t c0) const {
    if (!used) return;
    const int64_t first = c0 / p.head_channels(), last = (min(c0 + 32, p.channels) - 1) / p.head_channels();
    __syncthreads();  // those before have been read
    for (int64_t h = first + threadIdx.x / 32; h <= last; h += kPlainWarps)
      for_shared_taps<C>(p, FilterAt(p, b, 0, h), [&](int64_t j, C value) { values[(h - first) * pitch + j] = value; });
    __syncthreads();
  }

  // The filter of a block's channel, if there are any.
  CK_DEVICE const C* of_channel(const Problem& p, int64_t c) const {
    return used ? values + (c / p.head_channels() - c / 32 * 32 / p.head_channels()) * pitch : nullptr;
  }
};

// Calls use(b, c, filter, rows) for a thread's channels and runs of rows; `filter` of those that positions share, which
// has no dropout any more, or nullptr. Items: channel blocks of 32, then blocks of runs, then batch rows.
template <class T, class Use>
CK_DEVICE void for_plain_rows(const Problem& p, bool shared_filters, const Use& use) {
  const PlainRuns runs(p);
  const PlainFilters<Compute<T>> filters(p, shared_filters);
  const int64_t c_blocks = ceil_div(p.channels, 32), blocks = ceil_div(runs.count, kPlainWarps * kPlainRuns);
  for (int64_t item = first_item(); item < c_blocks * blocks * p.batch; item += item_stride()) {
    const int64_t c0 = item % c_blocks * 32, c = c0 + threadIdx.x % 32, b = item / c_blocks / blocks;
    filters.fill(p, b, c0);
    if (c >= p.channels) continue;
    const int64_t run = (item / c_blocks % blocks * kPlainWarps + threadIdx.x / 32) * kPlainRuns;
#pragma unroll 1
    for (int64_t r = run; r < min(run + kPlainRuns, runs.count); ++r)
      use(b, c, filters.of_channel(p, c), PlainRows(p, runs.first_position(p, r)));
  }
}

template <class T, bool kFinish>
CK_DEVICE void plain_outputs(const Forward& p, bool shared_filters) {
  using C = Compute<T>;
  for_plain_rows<T>(p, shared_filters, [&](int64_t b, int64_t c, const C* filter, const PlainRows& rows) {
    const C bias = p.bias == nullptr ? C{0} : load_as<C>(p.bias, c, p.bias_dtype);
    const auto store = [&](int64_t t, C total) {
      total += bias;
      if constexpr (kFinish) total = FinishAt<T>(p.finish, b, t, c).finished(total);
      *at<T>(p.y, b, t, c) = narrow<T>(total);
    };
    if (filter != nullptr && rows.whole) {
      C total[kPlainRun] = {};
      add_windows(total, filter, 1, p.taps.taps, [&](C(&z)[kPlainRun], int64_t m, int64_t count) {
        load_inputs<T>(z, p, b, p.taps.source(rows.first, m), p.taps.dilation, count, c, rows.sequence,
                       p.gates<kFinish>());
      });
#pragma unroll
      for (int i = 0; i < kPlainRun; ++i) store(rows.first + i * p.taps.dilation, total[i]);
      return;
    }
    rows.for_each(p, [&](int64_t t) {
      const Sequence sequence = sequence_of(p, t);
      const FilterAt f(p, b, t, c / p.head_channels());
      const Statistics<C> statistics = filter != nullptr ? Statistics<C>{} : statistics_of<C>(p, f, t, sequence);
      C total = 0;
      for (int64_t j = 0; j < p.taps.taps; ++j)
        total += (filter != nullptr ? filter[j] : tap_of(p, f, t, j, statistics, sequence).value()) *
                 load_input<T>(p, b, p.taps.source(t, j), c, sequence, p.gates<kFinish>());
      store(t, total);
    });
  });
}

template <class T>
CK_GLOBAL(kPlainThreads, kPlainBlocks<T>)
void plain_forward(const CK_PARAM Forward p, bool shared_filters) {
  plain_outputs<T, false>(p, shared_filters);
}

template <class T>
CK_GLOBAL(kPlainThreads, kPlainBlocks<T>)
void plain_forward_finished(const CK_PARAM Forward p, bool shared_filters) {
  plain_outputs<T, true>(p, shared_filters);
}

}  // namespace ck::cuda
