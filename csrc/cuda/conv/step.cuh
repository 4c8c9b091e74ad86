// Decoding: one position per call, the state moved up in place, in one launch, or in two if rows continue from others.
#pragma once

#include "csrc/cuda/conv/filters.cuh"

namespace ck::cuda {

constexpr int kStepThreads = 128;

// y[b, c] from the state's rows and x; then row b of `next` receives the rows without the oldest, and x. Unless `next`
// is another array, b = from, and no other thread reads or writes these elements.
template <class T>
CK_DEVICE void step_row(const Step& p, int64_t b, int64_t from, int64_t c, T* next) {
  using C = Compute<T>;
  const int64_t span = p.taps.span(), K = p.taps.taps, d = p.taps.dilation;
  const T* const old = static_cast<const T*>(p.state) + from * span * p.channels + c;
  const FilterAt f(p, b, 0, c / p.head_channels());
  const Sequence sequence{0, 0, 1, p.position == nullptr ? kUnbounded : -p.position[b * p.position_stride]};
  const Statistics<C> statistics = statistics_of<C>(p, f, 0, sequence);
  const C z = gated<T>(p, b, 0, c);
  C total = 0;
  for (int64_t j = 0; j < K; ++j)
    total += tap_of(p, f, 0, j, statistics, sequence).value() * (j < K - 1 ? widen(old[d * j * p.channels]) : z);
  if (p.bias != nullptr) total += load_as<C>(p.bias, c, p.bias_dtype);
  *at<T>(p.y, b, 0, c) = narrow<T>(total);
  if (span == 0) return;
  T* const to = next + b * span * p.channels + c;
  // What is written may be what is read, one row later: several are read before any is written.
  constexpr int kBatch = 8;
  for (int64_t row = 0; row < span - 1; row += kBatch) {
    T rows[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k)
      if (row + k < span - 1) rows[k] = old[(row + k + 1) * p.channels];
#pragma unroll
    for (int k = 0; k < kBatch; ++k)
      if (row + k < span - 1) to[(row + k) * p.channels] = rows[k];
  }
  to[(span - 1) * p.channels] = narrow<T>(z);
}

// A thread per channel and batch row. If rows continue from other rows, what one reads must not be overwritten yet: the
// new state is written to `scratch`, and copied by step_copy.
template <class T>
CK_GLOBAL(kStepThreads, 4)
void step(const CK_PARAM Step p) {
  T* const next = static_cast<T*>(p.state_row == nullptr ? p.next_state : p.scratch);
  const int64_t stride = int64_t{gridDim.x} * kStepThreads;
  for (int64_t i = int64_t{blockIdx.x} * kStepThreads + threadIdx.x; i < p.batch * p.channels; i += stride) {
    const int64_t c = i % p.channels, b = i / p.channels;
    // state_row is not validated on the host; clamp.
    const int64_t from = p.state_row == nullptr ? b : min(max(p.state_row[b], int64_t{0}), p.batch - 1);
    step_row<T>(p, b, from, c, next);
  }
}

template <class T>
CK_GLOBAL(kStepThreads, 4)
void step_copy(const CK_PARAM Step p) {
  const int64_t stride = int64_t{gridDim.x} * kStepThreads, count = p.batch * p.taps.span() * p.channels;
#pragma unroll 4
  for (int64_t i = int64_t{blockIdx.x} * kStepThreads + threadIdx.x; i < count; i += stride)
    static_cast<T*>(p.next_state)[i] = static_cast<const T*>(p.scratch)[i];
}

}  // namespace ck::cuda
