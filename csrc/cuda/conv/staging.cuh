// Copies of rows of a tensor to shared memory, and which rows a run of outputs reads.
#pragma once

#include "csrc/cuda/conv/inputs.cuh"
#include "csrc/cuda/device/reduce.cuh"
#include "csrc/cuda/device/vectors.cuh"

namespace ck::cuda {

// Dilation splits time into phases that share no window: row n of a phase is position first + dilation * n.
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
    const int64_t down = floor_div(s, d);
    to = {s - down * d, d};
    offset = down;
  }
};

// What stage_rows does, for rows of which some do not exist, or that are read in pieces: those of one thread, `first`
// and every `step` after it, `count` channels from c on.
template <class T, bool kInput, int kRows, int kBatch, class P>
CK_DEVICE void stage_any_rows(T* to, int pitch, const P& p, const Rows& rows, int64_t b, int64_t s, int64_t dilation,
                              int wanted, int64_t c, int count, int first, int step) {
  if (count <= 0) wanted = 0;
  int64_t position = s + first * dilation;
  const int64_t hop = step * dilation, stride = hop * rows.time;
  const T* from = at<const T>(rows, b, position, c);
  to += first * pitch;
#pragma unroll 1
  for (int row = first; row < kRows;) {
    unsigned valid = 0;
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int64_t t = position + k * hop;
      valid |= unsigned{row + k * step < wanted && t >= 0 && t < p.time} << k;
    }
    if (kInput && p.mask != nullptr) {
      // Read for every row, so that no branch comes between: the first of the mask where there is none.
      bool open[kBatch];
#pragma unroll
      for (int k = 0; k < kBatch; ++k)
        open[k] = p.mask[(valid >> k & 1) != 0 ? b * p.mask_batch + (position + k * hop) * p.mask_time : 0];
#pragma unroll
      for (int k = 0; k < kBatch; ++k) valid &= ~(unsigned{!open[k]} << k);
    }
    // One after the other: of all at once there would be much code.
#pragma unroll 1
    for (int k = 0; k < kBatch; ++k) {
      const T* found = (valid >> k & 1) != 0 ? from : nullptr;
      // The state's rows come before position 0 of an unpacked row.
      if (kInput && position < 0 && p.state != nullptr && row < wanted)
        found = state_at<const T>(p, const_cast<void*>(p.state), b, position, c, {0, 0, p.time, 0});
      stage_pieces(to, found == nullptr ? static_cast<const T*>(rows.data) : found, found == nullptr ? 0 : count,
                   p.vector_bytes);
      row += step;
      position += hop;
      from += stride;
      to += step * pitch;
    }
  }
}

// Starts the copies of 32 rows at positions s, s + dilation, ... to shared memory, by kThreads threads: of x or the
// gate (kInput), zeros where a position is masked, or of d(y), which no mask concerns; 1 << log_vectors times 16 bytes
// of each from channel c0 on, of which `channels` exist. Only the first `wanted` rows are needed. Of rows that do not
// exist, or are read in pieces, kBatch of a thread wait for their masks together; it has a whole number of them. A
// thread has the same channels in all its rows.
template <class T, bool kInput, int kThreads, int kBatch, class P>
CK_DEVICE void stage_rows(T* to, int pitch, int log_vectors, const P& p, const Rows& rows, int64_t b, int64_t s,
                          int64_t dilation, int wanted, int64_t c0, int channels) {
  constexpr int kRows = 32;
  const int column = (threadIdx.x & ((1 << log_vectors) - 1)) * kVector<T>, step = kThreads >> log_vectors;
  const int first = threadIdx.x >> log_vectors;
  const bool there = column < channels;
  to += column;
  if (p.vector_bytes != 16 || s < 0 || s + (kRows - 1) * dilation >= p.time || wanted < kRows)
    // Opaque, so that nothing of it is computed ahead, for the case below as well.
    return stage_any_rows<T, kInput, kRows, kBatch>(to, pitch, p, rows, b, s, dilation, wanted, c0 + column,
                                                    channels - column, opaque(first), step);
  // All rows exist, in whole vectors: one address is found and moved on.
  to += first * pitch;
  const T* from = static_cast<const T*>(rows.data);
  int64_t stride = 0;
  if (there) {
    from += b * rows.batch + (s + first * dilation) * rows.time + c0 + column;
    stride = step * dilation * rows.time;
  }
  // A lane reads the mask of one row, for all.
  unsigned open = kAllLanes;
  if (kInput && p.mask != nullptr)
    open = __ballot_sync(kAllLanes, p.mask[b * p.mask_batch + (s + threadIdx.x % 32 * dilation) * p.mask_time]);
  open = there ? open >> first : 0;
#pragma unroll
  for (int n = 0; n < (kRows << log_vectors) / kThreads; ++n, from += stride)
    cp_async<16>(to + n * step * pitch, from, (open >> n * step & 1) != 0);
}

}  // namespace ck::cuda
