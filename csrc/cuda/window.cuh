// Rows of a tensor on their way into shared memory, and which of them a run of outputs reads.
#pragma once

#include "inputs.cuh"

namespace ck::cuda {

// Elements of 16 bytes.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// Dilation splits time into phases that never meet: row n of a phase is position first + dilation * n.
struct Phase {
  int64_t first, dilation;

  CK_DEVICE int64_t position(int64_t n) const { return first + dilation * n; }
  // Rows of the phase among `time` positions.
  CK_DEVICE int64_t rows(int64_t time) const { return first < time ? ceil_div(time - first, dilation) : 0; }
};

// Output n of phase `from` reads, with tap j, row n + offset + j of phase `to`.
struct Reach {
  Phase from, to;
  int64_t offset;

  CK_DEVICE Reach(const Taps& taps, int64_t phase) : from{phase, taps.dilation} {
    const int64_t s = taps.source(phase, 0), d = taps.dilation;
    const int64_t down = s >= 0 ? s / d : -((-s + d - 1) / d);
    to = {s - down * d, d};
    offset = down;
  }
};

// Starts the copy of 16 bytes of a row to shared memory; zeros where it is not wanted.
template <class T>
CK_DEVICE void stage_vector(T* shared, const Rows& rows, int64_t b, int64_t s, int64_t c, bool wanted) {
  cp_async<16>(shared, wanted ? static_cast<const void*>(at<const T>(rows, b, s, c)) : rows.data, wanted);
}

// The same for x or the gate: zeros where a position is masked, the state's rows before position 0 of an unpacked row.
template <class T>
CK_DEVICE void stage_input(T* shared, const Problem& p, const Rows& rows, int64_t b, int64_t s, int64_t c) {
  if (s < 0 && p.state != nullptr) {
    const T* const row =
        c < p.channels ? state_at<const T>(p, const_cast<void*>(p.state), b, s, c, {0, 0, p.time, 0}) : nullptr;
    cp_async<16>(shared, row == nullptr ? p.state : row, row != nullptr);
    return;
  }
  stage_vector(shared, rows, b, s, c, c < p.channels && s >= 0 && s < p.time && !masked(p, b, s));
}

// The same for d(loss)/d(y), which no mask concerns.
template <class T>
CK_DEVICE void stage_gradient(T* shared, const Backward& p, int64_t b, int64_t s, int64_t c) {
  stage_vector(shared, p.grad, b, s, c, c < p.channels && s >= 0 && s < p.time);
}

// Starts the copies of kRows rows at positions s, s + dilation, ... to shared memory, by kThreads threads: of x or the
// gate (kInput), or of d(y); 1 << log_vectors times 16 bytes of each from channel c0 on, of which `channels` exist.
// Only the first `wanted` rows are needed. kBatch rows of a thread wait for their masks together.
template <class T, bool kInput, int kRows, int kThreads, int kBatch, class P>
CK_DEVICE void stage_rows(T* to, int pitch, int log_vectors, const P& p, const Rows& rows, int64_t b, int64_t s,
                          int64_t dilation, int wanted, int64_t c0, int channels) {
  // A thread has the same channels in all its rows.
  const int column = (threadIdx.x & ((1 << log_vectors) - 1)) * kVector<T>, step = kThreads >> log_vectors;
  const int first = threadIdx.x >> log_vectors;
  const bool there = column < channels;
  to += first * pitch + column;
  if (s < 0 || s + (kRows - 1) * dilation >= p.time || wanted < kRows) {
#pragma unroll 1
    for (int row = first; row < kRows; row += step, to += step * pitch) {
      const int64_t position = s + row * dilation, c = there && row < wanted ? c0 + column : p.channels;
      if constexpr (kInput)
        stage_input(to, p, rows, b, position, c);
      else
        stage_gradient(to, p, b, position, c);
    }
    return;
  }
  // All rows exist: one address is found and moved on.
  const T* from = static_cast<const T*>(rows.data);
  int64_t stride = 0;
  if (there) {
    from += b * rows.batch + (s + first * dilation) * rows.time + c0 + column;
    stride = step * dilation * rows.time;
  }
  const bool* mask =
      kInput && p.mask != nullptr ? p.mask + b * p.mask_batch + (s + first * dilation) * p.mask_time : nullptr;
  const int64_t mask_stride = step * dilation * p.mask_time;
#pragma unroll
  for (int n = 0; n < (kRows << log_vectors) / kThreads; n += kBatch) {
    bool valid[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) valid[k] = there;
    if (mask != nullptr)
#pragma unroll
      for (int k = 0; k < kBatch; ++k, mask += mask_stride) valid[k] = there && *mask;
#pragma unroll
    for (int k = 0; k < kBatch; ++k, from += stride) cp_async<16>(to + (n + k) * step * pitch, from, valid[k]);
  }
}

}  // namespace ck::cuda
