// Which kernels run a problem, and how the work is cut: plain data, chosen by pure functions of the problem, the same
// on every device and testable on any host.
#pragma once

#include "problem.h"

namespace ck::cuda {

enum class Family : int8_t {
  kPlain,   // any problem
  kStream,  // shared filters, channels side by side in memory: walks time with a window in registers
  kTime,    // shared filters, positions side by side in memory
  kBand,    // heads of 16 channels and more, 16-bit types: banded matrices on tensor cores
  kRows,    // filters that differ between positions, channels side by side
};

inline const char* name_of(Family family) {
  switch (family) {
    case Family::kPlain: return "plain";
    case Family::kStream: return "stream";
    case Family::kTime: return "time";
    case Family::kBand: return "band";
    case Family::kRows: return "rows";
  }
  return "unknown";
}

// What the choice depends on.
struct Facts {
  int64_t batch = 1, time = 1, channels = 1, heads = 1, taps = 1, dilation = 1;
  Dtype dtype = Dtype::kFloat32;
  bool per_position = false, renormalize = false, gate = false, packed = false, state = false;
  // Every tensor like x can be read 16 bytes at a time along its channels, or along its positions.
  bool channel_vectors = true, time_vectors = false;

  bool per_row() const { return per_position || renormalize; }
  int64_t head_channels() const { return channels / heads; }
};

struct Plan {
  Family family = Family::kPlain;
  int64_t groups = 1;  // pieces of an owner's positions, each summed by one block (backward)
};

// About as many blocks as keep the largest device busy, where a block may walk many positions.
constexpr int64_t kBlocks = 1024;

inline int64_t at_least_one(int64_t n) { return n < 1 ? 1 : n; }

// Pieces for sums over `rows` positions that `columns` blocks share: enough to fill a device, and not below 64
// positions.
inline int64_t groups_of(int64_t rows, int64_t columns) {
  const int64_t wanted = at_least_one(kBlocks / at_least_one(columns)), possible = at_least_one(rows / 64);
  return wanted < possible ? wanted : possible;
}

inline Plan plan_forward(const Facts& f) {
  (void)f;
  return {};
}

inline Plan plan_backward(const Facts& f) {
  const int64_t columns = f.per_row() ? f.heads / 8 : f.channels / 32 * ((f.taps + 7) / 8);
  return {Family::kPlain, groups_of(f.batch * f.time, columns)};
}

}  // namespace ck::cuda
