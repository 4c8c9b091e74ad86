// The backward passes for every problem.
#pragma once

#include "csrc/cuda/conv/plain.cuh"

namespace ck::cuda {

constexpr int kPlainTaps = kPlainRun;  // sums per thread of plain_weight

// Statistics of filters that differ between positions, a thread each.
template <class T>
CK_GLOBAL(kPlainThreads, 2)
void plain_statistics(const CK_PARAM Backward p) {
  using C = Compute<T>;
  const int64_t filters = p.batch * p.time * p.heads;
  for (int64_t i = first_item() * kPlainThreads + threadIdx.x; i < filters; i += item_stride() * kPlainThreads) {
    const int64_t h = i % p.heads, t = i / p.heads % p.time, b = i / p.heads / p.time;
    const Statistics<C> found = statistics_of<C>(p, FilterAt(p, b, t, h), t, sequence_of(p, t));
    C* const out = static_cast<C*>(p.statistics) + 2 * i;
    out[0] = found.max;
    out[1] = found.inverse;
  }
}

// d(loss)/d(z[s]) as the outputs of the sequence see position s, which may be a row of the state.
template <class T>
CK_DEVICE Compute<T> input_gradient(const Backward& p, int64_t b, int64_t s, int64_t c, const Sequence& sequence) {
  using C = Compute<T>;
  const int64_t h = c / p.head_channels();
  Statistics<C> statistics;
  if (!p.per_row()) statistics = statistics_of<C>(p, FilterAt(p, b, 0, h), 0, sequence);
  C total = 0;
  for (int64_t j = 0; j < p.taps.taps; ++j) {
    const int64_t t = p.taps.target(s, j);
    if (!sequence.contains(t)) continue;
    if (p.per_row() && p.softmax) {
      const C* const saved = static_cast<const C*>(p.statistics) + 2 * ((b * p.time + t) * p.heads + h);
      statistics = {saved[0], saved[1]};
    }
    total += tap_of(p, FilterAt(p, b, t, h), t, j, statistics, sequence).value() * widen(*at<const T>(p.grad, b, t, c));
  }
  return total;
}

template <class T>
CK_GLOBAL(kPlainThreads, 2)
void plain_input(const CK_PARAM Backward p, bool shared_filters) {
  using C = Compute<T>;
  const Taps taps = p.taps.transposed();
  for_plain_rows<T>(p, shared_filters, [&](int64_t b, int64_t c, const C* filter, const PlainRows& rows) {
    if (filter != nullptr && rows.whole) {
      C total[kPlainRun] = {};
      add_windows(total, filter + taps.taps - 1, -1, taps.taps, [&](C(&dy)[kPlainRun], int64_t m, int64_t count) {
#pragma unroll
        for (int k = 0; k < kPlainRun; ++k) {
          const int64_t t = taps.source(rows.first, m + k);
          const bool exists = k < count && rows.sequence.contains(t);
          dy[k] = widen(exists ? *at<const T>(p.grad, b, t, c) : T{});
        }
      });
#pragma unroll
      for (int i = 0; i < kPlainRun; ++i) store_input_gradient<T>(p, b, rows.first + i * p.taps.dilation, c, total[i]);
      return;
    }
    rows.for_each(
        p, [&](int64_t s) { store_input_gradient<T>(p, b, s, c, input_gradient<T>(p, b, s, c, sequence_of(p, s))); });
  });
}

// The same for rows of the state: the positions before each sequence.
template <class T>
CK_GLOBAL(kPlainThreads, 2)
void plain_state(const CK_PARAM Backward p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t c_blocks = ceil_div(p.channels, 32), rows = p.batch * p.sequences * p.taps.span();
  for (int64_t item = first_item(); item < c_blocks * ceil_div(rows, kPlainWarps); item += item_stride()) {
    const int64_t c = item % c_blocks * 32 + lane, row = item / c_blocks * kPlainWarps + warp;
    if (c >= p.channels || row >= rows) continue;
    const int64_t b = row / p.taps.span() / p.sequences;
    const Sequence sequence =
        p.offsets == nullptr ? sequence_of(p, 0) : numbered_sequence(p, row / p.taps.span() % p.sequences);
    // An empty sequence reads nothing, and its gradient was set to 0.
    if (sequence.begin >= sequence.end) continue;
    const int64_t s = sequence.begin - p.taps.span() + row % p.taps.span();
    *state_at<T>(p, p.grad_state, b, s, c, sequence) = narrow<T>(input_gradient<T>(p, b, s, c, sequence));
  }
}

// Pieces [first, last) of an owner's work that a group adds up, `count` of each of its batch rows.
struct GroupPieces {
  int64_t first, last, batch;

  CK_DEVICE GroupPieces(const Backward& p, int64_t owner, int64_t group, int64_t count) {
    const int64_t all = p.owner_batch() * count, each = ceil_div(all, p.groups);
    first = min(group * each, all);
    last = min(first + each, all);
    batch = owner;  // of piece 0; more only if there is one owner
  }
};

// Sums over positions of dy[t] z[source(t, j)]: partial_weight[owner, group, c, j], for filters that all positions of
// an owner share. Items: channel blocks of 32, then blocks of taps, then groups of runs, then owners.
template <class T>
CK_GLOBAL(kPlainThreads, kPlainBlocks<T>)
void plain_weight(const CK_PARAM Backward p) {
  using C = Compute<T>;
  CK_SHARED(C, sums, kPlainWarps * 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const PlainRuns runs(p);
  const int64_t K = p.taps.taps, c_blocks = ceil_div(p.channels, 32), j_blocks = ceil_div(K, kPlainTaps);
  for (int64_t item = first_item(); item < c_blocks * j_blocks * p.groups * p.owners(); item += item_stride()) {
    const int64_t c = item % c_blocks * 32 + lane, j0 = item / c_blocks % j_blocks * kPlainTaps;
    const int64_t group = item / c_blocks / j_blocks % p.groups, owner = item / c_blocks / j_blocks / p.groups;
    const GroupPieces pieces(p, owner, group, runs.count);
    C total[kPlainTaps] = {};
    if (c < p.channels)
#pragma unroll 1
      for (int64_t piece = pieces.first + warp; piece < pieces.last; piece += kPlainWarps) {
        const int64_t b = pieces.batch + piece / runs.count;
        const PlainRows rows(p, runs.first_position(p, piece % runs.count));
        const auto load = [&](C(&z)[kPlainTaps], int64_t s, int64_t count, const Sequence& sequence) {
          load_inputs<T>(z, p, b, s, p.taps.dilation, count, c, sequence, p.gate_activation);
        };
        C z[kPlainTaps];
        if (rows.whole) {
          C dy[kPlainRun], next[kPlainTaps];
          const int64_t s = p.taps.source(rows.first, j0);
          load(z, s, kPlainTaps, rows.sequence);
          load(next, s + kPlainTaps * p.taps.dilation, kPlainRun - 1, rows.sequence);
#pragma unroll
          for (int i = 0; i < kPlainRun; ++i)
            dy[i] = widen(*at<const T>(p.grad, b, rows.first + i * p.taps.dilation, c));
#pragma unroll
          for (int u = 0; u < kPlainTaps; ++u)
#pragma unroll
            for (int i = 0; i < kPlainRun; ++i)
              total[u] += dy[i] * (u + i < kPlainTaps ? z[u + i] : next[u + i - kPlainTaps]);
        } else {
          rows.for_each(p, [&](int64_t t) {
            load(z, p.taps.source(t, j0), kPlainTaps, sequence_of(p, t));
            const C dy = widen(*at<const T>(p.grad, b, t, c));
#pragma unroll
            for (int u = 0; u < kPlainTaps; ++u) total[u] += dy * z[u];
          });
        }
      }
    for (int u = 0; u < kPlainTaps; ++u) {
      sums[threadIdx.x] = total[u];
      __syncthreads();
      if (warp == 0 && c < p.channels && j0 + u < K) {
        C all = 0;
        for (int w = 0; w < kPlainWarps; ++w) all += sums[w * 32 + lane];
        static_cast<C*>(p.partial_weight)[((owner * p.groups + group) * p.channels + c) * K + j0 + u] = all;
      }
      __syncthreads();
    }
  }
}

// d(weight) of filters that differ between positions, a warp per filter: a tap per lane, and with few taps as many
// channels at a time as there are lanes for. Filters of their own are finished here; with renormalize alone they are
// summed over the positions of a group: partial_weight[owner, group, h, j]. Items: heads, then positions and batch
// rows, or groups and owners. Shared memory: 2 K numbers per warp.
template <class T>
CK_GLOBAL(kPlainThreads, 2)
void plain_weight_rows(const CK_PARAM Backward p) {
  using C = Compute<T>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t K = p.taps.taps, R = p.head_channels();
  int width = 1;  // lanes with taps of one channel
  while (width < 32 && width < K) width *= 2;
  const int first_tap = lane % width, channels = 32 / width;
  C* const d = reinterpret_cast<C*>(shared_memory()) + warp * 2 * K;
  C* const sums = d + K;
  const int64_t items = p.heads * (p.per_position ? p.batch * p.time : p.owners() * p.groups);
  for (int64_t item = first_item() * warps + warp; item < items; item += item_stride() * warps) {
    const int64_t h = item % p.heads, rest = item / p.heads;
    const int64_t owner = p.per_position ? 0 : rest / p.groups;
    const GroupPieces rows(p, owner, p.per_position ? 0 : rest % p.groups, p.time);
    const int64_t first = p.per_position ? rest : rows.first, last = p.per_position ? rest + 1 : rows.last;
    for (int64_t j = lane; j < K; j += 32) sums[j] = 0;
    for (int64_t row = first; row < last; ++row) {
      const int64_t t = row % p.time, b = owner + row / p.time;
      const Sequence sequence = sequence_of(p, t);
      const FilterAt f(p, b, t, h);
      const Statistics<C> statistics = warp_statistics<C>(p, f, t, lane, sequence);
      for (int64_t j0 = 0; j0 < K; j0 += width) {
        const int64_t j = j0 + first_tap;
        C total = 0;
        if (j < K)
          for (int64_t c = h * R + lane / width; c < (h + 1) * R; c += channels)
            total += widen(*at<const T>(p.grad, b, t, c)) *
                     load_input<T>(p, b, p.taps.source(t, j), c, sequence, p.gate_activation);
        for (int distance = width; distance < 32; distance *= 2) total += __shfl_xor_sync(kAllLanes, total, distance);
        if (j < K && lane < width) d[j] = total;
      }
      __syncwarp();
      C inner = 0;
      for (int64_t j = lane; j < K; j += 32) {
        const Tap<C> tap = tap_of(p, f, t, j, statistics, sequence);
        d[j] *= tap.factor;
        inner += tap.p * d[j];
      }
      inner = p.softmax ? lane_sum(inner) : C{0};
      for (int64_t j = lane; j < K; j += 32) {
        const C out = p.softmax ? tap_of(p, f, t, j, statistics, sequence).p * (d[j] - inner) : d[j];
        if (p.per_position)
          store_as(p.grad_weight, ((b * p.time + t) * p.heads + h) * K + j, p.weight_dtype, out);
        else
          sums[j] += out;
      }
      __syncwarp();  // d has been read
    }
    if (!p.per_position)
      for (int64_t j = lane; j < K; j += 32) static_cast<C*>(p.partial_weight)[(rest * p.heads + h) * K + j] = sums[j];
    __syncwarp();
  }
}

// partial_bias[group, c]: sums of dy. Items: channel blocks of 32, then groups.
template <class T>
CK_GLOBAL(kPlainThreads, 2)
void plain_bias(const CK_PARAM Backward p, int64_t groups) {
  using C = Compute<T>;
  CK_SHARED(C, sums, kPlainWarps * 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t c_blocks = ceil_div(p.channels, 32), rows = p.batch * p.time, each = ceil_div(rows, groups);
  for (int64_t item = first_item(); item < c_blocks * groups; item += item_stride()) {
    const int64_t c = item % c_blocks * 32 + lane, group = item / c_blocks;
    C total = 0;
    if (c < p.channels)
      for (int64_t row = group * each + warp; row < min((group + 1) * each, rows); row += kPlainWarps)
        total += widen(*at<const T>(p.grad, row / p.time, row % p.time, c));
    sums[threadIdx.x] = total;
    __syncthreads();
    if (warp == 0 && c < p.channels) {
      C all = 0;
      for (int w = 0; w < kPlainWarps; ++w) all += sums[w * 32 + lane];
      static_cast<C*>(p.partial_bias)[group * p.channels + c] = all;
    }
    __syncthreads();
  }
}

}  // namespace ck::cuda
