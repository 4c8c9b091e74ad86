// Filters in shared memory, and runs of positions that a thread computes at a time.
#pragma once

#include "csrc/cuda/conv/problem.h"

namespace ck::cuda {

// Numbers from one filter in shared memory to the next: odd, so that they lie in different banks.
CK_HD int64_t plain_pitch(int64_t taps) { return taps / 2 * 2 + 1; }

constexpr int kPlainRun = 8;  // rows of a phase that a thread computes at a time

// Runs of rows of a phase, `dilation` positions apart, whose windows overlap: phase after phase of so many positions.
struct PlainRuns {
  int64_t per_phase, count;

  CK_HD PlainRuns(int64_t time, int64_t dilation)
      : per_phase(((time + dilation - 1) / dilation + kPlainRun - 1) / kPlainRun),
        count((dilation < time ? dilation : time) * per_phase) {}
  // Of a batch row.
  CK_HD explicit PlainRuns(const Problem& p) : PlainRuns(p.time, p.taps.dilation) {}

  CK_HD int64_t first_position(const Problem& p, int64_t run) const {
    return run / per_phase + run % per_phase * kPlainRun * p.taps.dilation;
  }
};

}  // namespace ck::cuda
