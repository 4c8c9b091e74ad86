// Decoding: one position per call, the state moved up in place, in one launch.
#pragma once

#include "filters.cuh"

namespace ck::cuda {

constexpr int kStepThreads = 128;

// y[b, c] from the state's rows and x; then row b of `next` receives the rows without the oldest, and x. A thread has
// its channel to itself: nobody else reads or writes it.
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
  for (int64_t row = 0; row < span - 1; ++row) to[row * p.channels] = old[(row + 1) * p.channels];
  to[(span - 1) * p.channels] = narrow<T>(z);
}

// A thread per channel, and per batch row unless rows continue from other rows: then a thread walks them all, twice,
// because what it reads must not be overwritten yet.
template <class T>
CK_GLOBAL(kStepThreads, 4)
void step(const CK_PARAM Step p) {
  T* const state = static_cast<T*>(p.next_state);
  T* const scratch = static_cast<T*>(p.scratch);
  const int64_t channels = p.channels, rows = p.state_row == nullptr ? p.batch : 1, span = p.taps.span();
  const int64_t stride = int64_t{gridDim.x} * kStepThreads;
  for (int64_t i = int64_t{blockIdx.x} * kStepThreads + threadIdx.x; i < rows * channels; i += stride) {
    const int64_t c = i % channels, b = i / channels;
    if (p.state_row == nullptr) {
      step_row<T>(p, b, b, c, state);
      continue;
    }
    for (int64_t row = 0; row < p.batch; ++row) {
      // Nobody has looked at the indices on the host: a wrong one must not leave the memory.
      const int64_t from = least(most(p.state_row[row], int64_t{0}), p.batch - 1);
      step_row<T>(p, row, from, c, scratch);
    }
    for (int64_t k = c; k < p.batch * span * channels; k += channels) state[k] = scratch[k];
  }
}

}  // namespace ck::cuda
