// How a decoding step is cut into blocks: plain numbers, for its launch and its kernel.
#pragma once

#include <algorithm>

#include "csrc/cuda/conv/problem.h"

namespace ck::cuda {

constexpr int kStepThreads = 512;  // of a block at most: one that has all batch rows is alone on its multiprocessor
constexpr int kStepUnit = 128;     // threads are a multiple of it, and of a block's channels

// Bytes of a block's channels: a line of the cache, or less for more blocks, down to what memory reads at once.
constexpr int64_t kStepLine = 128, kStepSector = 32;

// A block computes `width` channels of `rows` batch rows: of all of them if some continue from others' states, as then
// no other block reads what it overwrites. Shared memory holds `depth` rows of the states of `held` batch rows at a
// time, and the filters, if there is room. States that are held whole begin `pitch` rows apart, an odd number if there
// is room: so threads of different batch rows find different banks.
struct StepTiles {
  int64_t width = 0, rows = 0, held = 0, depth = 0, pitch = 0;
  int64_t heads = 0;  // that a block's channels belong to at most; 0: without filters in shared memory
  int64_t filter_bytes = 0, shared_bytes = 0;
  int threads = 0;
  unsigned blocks = 0;

  CK_HD bool whole(int64_t span) const { return held == rows && depth == span; }
};

// The tiles of blocks whose channels take `line` bytes.
inline StepTiles step_tiles(const Step& p, const Device& device, int64_t line) {
  const int64_t size = size_of(p.dtype), span = p.taps.span(), channels = p.head_channels();
  const auto ceil = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  StepTiles t;
  t.width = line / size;
  const int64_t columns = ceil(p.channels, t.width);
  // Several outputs per thread, so that much is under way; fewer where blocks are few, or states long.
  const int64_t threads = p.state_row != nullptr ? kStepThreads : kStepThreads / 2;
  t.rows = p.state_row != nullptr ? p.batch : std::min(p.batch, 4 * threads / t.width);
  const auto crowded = [&] {
    return columns * ceil(p.batch, t.rows) < 2 * device.multiprocessors || t.rows * span * line > device.memory / 4;
  };
  while (p.state_row == nullptr && t.rows > 1 && crowded()) t.rows = (t.rows + 1) / 2;

  t.heads = std::min(p.heads, ceil(t.width - 1, channels) + 1);
  const auto filter_bytes = [&] {
    const int64_t filters = t.heads * (p.per_row() ? t.rows : 1);
    return ceil(filters * p.taps.taps * (size == 8 ? 8 : 4), kVectorBytes) * kVectorBytes;
  };
  if (filter_bytes() > device.block_memory / 4) t.heads = 0;
  t.filter_bytes = filter_bytes();
  const int64_t lines = (device.block_memory - t.filter_bytes) / line;
  t.held = span == 0 ? t.rows : std::min(t.rows, lines);
  t.depth = t.rows * span <= lines ? span : std::max<int64_t>(1, lines / t.rows);
  t.pitch = span > 0 && t.whole(span) && t.rows * (span | 1) <= lines ? span | 1 : t.depth;
  t.shared_bytes = t.filter_bytes + t.held * t.pitch * line;
  t.threads = static_cast<int>(std::min<int64_t>(threads, ceil(t.rows * t.width, kStepUnit) * kStepUnit));
  t.blocks = static_cast<unsigned>(columns * ceil(p.batch, t.rows));
  return t;
}

// The widest tiles of as many blocks as there are multiprocessors, whose states are held whole; otherwise the
// narrowest.
inline StepTiles step_tiles(const Step& p, const Device& device) {
  for (int64_t line = kStepLine; line > kStepSector; line /= 2) {
    const StepTiles t = step_tiles(p, device, line);
    if (t.blocks >= device.multiprocessors && t.whole(p.taps.span())) return t;
  }
  return step_tiles(p, device, kStepSector);
}

}  // namespace ck::cuda
