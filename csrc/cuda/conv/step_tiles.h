// How a decoding step is cut into blocks: plain numbers, for its launch and its kernels.
#pragma once

#include <algorithm>

#include "csrc/cuda/conv/runs.h"

namespace ck::cuda {

constexpr int kStepThreads = 512;   // of a block at most: one that has all batch rows is alone on its multiprocessor
constexpr int kServeThreads = 256;  // of all other blocks
constexpr int kStepUnit = 128;      // threads are a multiple of it, and of a block's channels

// Bytes of a block's channels: a line of the cache, or less for more blocks, down to what memory reads at once.
constexpr int64_t kStepLine = 128, kStepSector = 32;

// Positions of a piece of a sequence, and of one whose positions have filters of their own, where windows are shorter.
constexpr int64_t kStepPiece = 64, kStepOwnPiece = 16;
constexpr int64_t kStepPieces = 64;  // that a block has at most, if sequences are cut

// How states lie in the pool and in shared memory: rows of channels side by side, or all rows of a channel side by side
// and channel after channel, both copied in vectors; or anyhow, copied number by number, in the order of kRun.
enum class StepLayout { kRows, kRun, kNumbers };

// One of the pieces that a block has, in shared memory if sequences are cut.
struct StepPiece {
  int64_t sequence, from;  // its positions are those from `from` on
  int items;               // positions or runs of them, that a thread has one at a time
};

// A block computes `width` channels of `rows` pieces of sequences, which have `time` positions at most; only the first
// of a sequence reads and writes states. Where some continue from others' states it has all sequences, uncut, as then
// no other block reads what it overwrites. Shared memory holds `depth` rows of the states of `held` pieces at a time,
// and the filters, if there is room. States that are held whole begin `pitch` rows apart, an odd number if there is
// room: so threads of different pieces find different banks.
struct StepTiles {
  int64_t width = 0, rows = 0, held = 0, depth = 0, pitch = 0;
  int64_t time = 1, pieces = 1, total = 0;  // `pieces` of a sequence that is not packed, and of all sequences
  int64_t heads = 0;  // that a block's channels belong to at most; 0: without filters in shared memory
  int64_t filter_bytes = 0, piece_bytes = 0, shared_bytes = 0;
  StepLayout layout = StepLayout::kRows;
  bool one = false;  // position per sequence, and nothing else for which there is the other kernel
  int threads = 0;
  unsigned blocks = 0;

  CK_HD bool whole(int64_t state_rows) const { return held == rows && depth == state_rows; }
  // Threads compute runs of more positions than this.
  CK_HD bool runs(const Problem& p, int64_t positions) const {
    return positions > kPlainRun && heads > 0 && !p.per_row();
  }
  CK_HD int64_t items(const Problem& p, int64_t positions) const {
    return runs(p, positions) ? PlainRuns(positions, p.taps.dilation).count : positions < 0 ? 0 : positions;
  }
};

// Whether blocks have all sequences.
inline bool step_reorders(const Step& p) { return p.states.source.data != nullptr; }

// Whether states that sequences continue from can be overwritten a few rows at a time, from the oldest on.
inline bool step_moves_up(const Step& p) {
  return !step_reorders(p) || (p.states.accepted.data == nullptr && p.time > 0);
}

inline StepLayout step_layout(const Step& p) {
  const Rows& pool = p.states.pool;
  if (pool.channel == 1) return StepLayout::kRows;
  return pool.channel == p.states.width && (pool.time == 1 || p.states.width == 1) ? StepLayout::kRun
                                                                                   : StepLayout::kNumbers;
}

// The tiles of blocks whose channels take `line` bytes.
inline StepTiles step_tiles(const Step& p, const Device& device, int64_t line) {
  const int64_t size = size_of(p.dtype), channels = p.head_channels(), states = p.states.width;
  const auto ceil = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const bool packed = p.offsets != nullptr, reorders = step_reorders(p);
  StepTiles t;
  t.width = line / size;
  const int64_t columns = ceil(p.channels, t.width);
  t.time = std::max(p.taps.span(), p.per_row() ? kStepOwnPiece : kStepPiece);
  if (!packed && (reorders || p.time <= t.time)) t.time = std::max<int64_t>(p.time, 1);
  t.pieces = packed ? 1 : std::max<int64_t>(ceil(p.time, t.time), 1);
  t.total = packed ? p.states.sequences + p.time / t.time : p.states.sequences * t.pieces;
  const bool cut = packed || t.pieces > 1;

  t.heads = std::min(p.heads, ceil(t.width - 1, channels) + 1);
  const auto filter_bytes = [&] {
    const int64_t filters = t.heads * (p.per_row() ? t.rows * t.time : 1);
    return ceil(filters * plain_pitch(p.taps.taps) * (size == 8 ? 8 : 4), kVectorBytes) * kVectorBytes;
  };
  // Several outputs per thread, so that much is under way; fewer where blocks are few, or states long.
  int64_t items = t.items(p, t.time);
  if (packed) items = std::min(items, ceil(p.time, p.states.sequences));
  t.rows = std::min(t.total, std::max<int64_t>(1, 4 * kServeThreads / t.width / std::max<int64_t>(items, 1)));
  if (cut) t.rows = std::min(t.rows, kStepPieces);
  const auto crowded = [&] {
    return columns * ceil(t.total, t.rows) < 2 * device.multiprocessors || t.rows * states * line > device.memory / 4 ||
           (cut && filter_bytes() > device.block_memory / 4);
  };
  while (!reorders && t.rows > 1 && crowded()) t.rows = (t.rows + 1) / 2;
  if (reorders) t.rows = t.total;

  if (filter_bytes() > device.block_memory / 4) t.heads = 0;
  t.filter_bytes = filter_bytes();
  if (cut) t.piece_bytes = ceil(t.rows * static_cast<int64_t>(sizeof(StepPiece)), kVectorBytes) * kVectorBytes;
  const int64_t lines = (device.block_memory - t.filter_bytes - t.piece_bytes) / line;
  t.held = states == 0 ? t.rows : std::min(t.rows, lines);
  t.depth = t.rows * states <= lines ? states : std::max<int64_t>(1, lines / t.rows);
  const bool whole = t.whole(states);
  t.pitch = states > 0 && whole && t.rows * (states | 1) <= lines ? states | 1 : t.depth;
  t.layout = step_layout(p);
  if (line < kVectorBytes || (t.layout == StepLayout::kRun && !whole)) t.layout = StepLayout::kNumbers;
  t.one = whole && t.layout == StepLayout::kRows && !packed && p.time == 1 && p.states.slot.data == nullptr &&
          states == p.taps.span();
  t.shared_bytes = t.filter_bytes + t.piece_bytes + t.held * t.pitch * line;
  t.threads = static_cast<int>(
      std::min<int64_t>(t.one && reorders ? kStepThreads : kServeThreads,
                        ceil(t.rows * std::max<int64_t>(t.items(p, t.time), 1) * t.width, kStepUnit) * kStepUnit));
  t.blocks = static_cast<unsigned>(columns * ceil(t.total, t.rows));
  return t;
}

// The widest tiles of as many blocks as there are multiprocessors, whose states are held whole; otherwise the
// narrowest that read memory as it comes, or, if states must be held whole, of however few channels.
inline StepTiles step_tiles(const Step& p, const Device& device) {
  int64_t line = kStepLine;
  for (; line > kStepSector; line /= 2) {
    const StepTiles t = step_tiles(p, device, line);
    if (t.blocks >= device.multiprocessors && t.whole(p.states.width)) return t;
  }
  while (!step_moves_up(p) && line > size_of(p.dtype) && !step_tiles(p, device, line).whole(p.states.width)) line /= 2;
  return step_tiles(p, device, line);
}

}  // namespace ck::cuda
