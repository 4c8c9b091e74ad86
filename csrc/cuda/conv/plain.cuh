// The kernels for every problem: any strides, types, number of taps and combination of arguments. The faster families
// serve what they can, this one the rest; float64 always.
#pragma once

#include "csrc/cuda/conv/filters.cuh"

namespace ck::cuda {

constexpr int kPlainThreads = 256, kPlainWarps = kPlainThreads / 32;
constexpr int kPlainRows = 4;  // positions per thread of plain_forward
constexpr int kPlainTaps = 8;  // sums per thread of plain_weight

// Pieces of work are numbered along one axis of the grid, which may be shorter than they are many.
CK_DEVICE int64_t first_item() { return blockIdx.x; }
CK_DEVICE int64_t item_stride() { return gridDim.x; }

// Items: channel blocks of 32, then blocks of positions, then batch rows.
template <class T>
CK_GLOBAL(kPlainThreads, 2)
void plain_forward(const CK_PARAM Forward p) {
  using C = Compute<T>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t c_blocks = ceil_div(p.channels, 32), t_blocks = ceil_div(p.time, kPlainWarps * kPlainRows);
  for (int64_t item = first_item(); item < c_blocks * t_blocks * p.batch; item += item_stride()) {
    const int64_t c = item % c_blocks * 32 + lane, b = item / c_blocks / t_blocks;
    const int64_t first = item / c_blocks % t_blocks * kPlainWarps * kPlainRows + warp * kPlainRows;
    if (c >= p.channels) continue;
    const int64_t h = c / p.head_channels();
    const C bias = p.bias == nullptr ? C{0} : load_as<C>(p.bias, c, p.bias_dtype);
    Statistics<C> statistics;
    for (int64_t t = first; t < min(first + kPlainRows, p.time); ++t) {
      const Sequence sequence = sequence_of(p, t);
      const FilterAt f(p, b, t, h);
      if (t == first || p.per_row()) statistics = statistics_of<C>(p, f, t, sequence);
      C total = 0;
      for (int64_t j = 0; j < p.taps.taps; ++j)
        total +=
            tap_of(p, f, t, j, statistics, sequence).value() * load_input<T>(p, b, p.taps.source(t, j), c, sequence);
      *at<T>(p.y, b, t, c) = narrow<T>(total + bias);
    }
  }
}

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

// Items: channel blocks of 32, then blocks of as many positions as there are warps, then batch rows.
template <class T>
CK_GLOBAL(kPlainThreads, 2)
void plain_input(const CK_PARAM Backward p) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t c_blocks = ceil_div(p.channels, 32), s_blocks = ceil_div(p.time, kPlainWarps);
  for (int64_t item = first_item(); item < c_blocks * s_blocks * p.batch; item += item_stride()) {
    const int64_t c = item % c_blocks * 32 + lane, b = item / c_blocks / s_blocks;
    const int64_t s = item / c_blocks % s_blocks * kPlainWarps + warp;
    if (c < p.channels && s < p.time)
      store_input_gradient<T>(p, b, s, c, input_gradient<T>(p, b, s, c, sequence_of(p, s)));
  }
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

// Positions [first, last) of an owner's batch rows that a group adds up, as indices over its rows of positions.
struct GroupRows {
  int64_t first, last, batch;

  CK_DEVICE GroupRows(const Backward& p, int64_t owner, int64_t group) {
    const int64_t rows = p.owner_batch() * p.time, each = ceil_div(rows, p.groups);
    first = min(group * each, rows);
    last = min(first + each, rows);
    batch = owner;  // of position 0; more only if there is one owner
  }
};

// Sums over positions of dy[t] z[source(t, j)]: partial_weight[owner, group, c, j], for filters that all positions of
// an owner share. Items: channel blocks of 32, then blocks of taps, then groups, then owners.
template <class T>
CK_GLOBAL(kPlainThreads, 2)
void plain_weight(const CK_PARAM Backward p) {
  using C = Compute<T>;
  CK_SHARED(C, sums, kPlainWarps * 32);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t K = p.taps.taps, c_blocks = ceil_div(p.channels, 32), j_blocks = ceil_div(K, kPlainTaps);
  for (int64_t item = first_item(); item < c_blocks * j_blocks * p.groups * p.owners(); item += item_stride()) {
    const int64_t c = item % c_blocks * 32 + lane, j0 = item / c_blocks % j_blocks * kPlainTaps;
    const int64_t group = item / c_blocks / j_blocks % p.groups, owner = item / c_blocks / j_blocks / p.groups;
    const GroupRows rows(p, owner, group);
    C total[kPlainTaps] = {};
    if (c < p.channels) {
      for (int64_t row = rows.first + warp; row < rows.last; row += kPlainWarps) {
        const int64_t t = row % p.time, b = rows.batch + row / p.time;
        const Sequence sequence = sequence_of(p, t);
        const C dy = widen(*at<const T>(p.grad, b, t, c));
        for (int u = 0; u < kPlainTaps; ++u)
          if (j0 + u < K) total[u] += dy * load_input<T>(p, b, p.taps.source(t, j0 + u), c, sequence);
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

// d(weight) of filters that differ between positions, a warp per filter, a tap per lane. Filters of their own are
// finished here; with renormalize alone they are summed over the positions of a group: partial_weight[owner, group, h,
// j]. Items: heads, then positions and batch rows, or groups and owners. Shared memory: 2 K numbers per warp.
template <class T>
CK_GLOBAL(kPlainThreads, 2)
void plain_weight_rows(const CK_PARAM Backward p) {
  using C = Compute<T>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t K = p.taps.taps, R = p.head_channels();
  C* const d = reinterpret_cast<C*>(shared_memory()) + warp * 2 * K;
  C* const sums = d + K;
  const int64_t items = p.heads * (p.per_position ? p.batch * p.time : p.owners() * p.groups);
  for (int64_t item = first_item() * warps + warp; item < items; item += item_stride() * warps) {
    const int64_t h = item % p.heads, rest = item / p.heads;
    const int64_t owner = p.per_position ? 0 : rest / p.groups;
    const GroupRows rows(p, owner, p.per_position ? 0 : rest % p.groups);
    const int64_t first = p.per_position ? rest : rows.first, last = p.per_position ? rest + 1 : rows.last;
    for (int64_t j = lane; j < K; j += 32) sums[j] = 0;
    for (int64_t row = first; row < last; ++row) {
      const int64_t t = row % p.time, b = owner + row / p.time;
      const Sequence sequence = sequence_of(p, t);
      const FilterAt f(p, b, t, h);
      const Statistics<C> statistics = warp_statistics<C>(p, f, t, lane, sequence);
      C inner = 0;
      for (int64_t j = lane; j < K; j += 32) {
        C total = 0;
        for (int64_t c = h * R; c < (h + 1) * R; ++c)
          total += widen(*at<const T>(p.grad, b, t, c)) * load_input<T>(p, b, p.taps.source(t, j), c, sequence);
        const Tap<C> tap = tap_of(p, f, t, j, statistics, sequence);
        d[j] = total * tap.factor;
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
