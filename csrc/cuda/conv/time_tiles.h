// How the time family cuts a problem: plain numbers, for the choice of kernels, their launches and the kernels.
#pragma once

#include "csrc/common/taps.h"

namespace ck::cuda {

constexpr int kEight = 8;  // consecutive positions of a lane: a chunk
constexpr int kTimeWarps = 4;
constexpr int kTimeStages = 3;   // tiles in shared memory: one is computed, the others are on their way
constexpr int kTimeStretch = 4;  // tiles side by side that one bulk copy brings

// Filters of a longer span would leave no shared memory for rows of 32 chunks.
constexpr int64_t kTimeSpan = 1024;

// Pieces of work per multiprocessor, for warps that fill it a few times over.
constexpr int64_t kTimeItems = 64;

// A warp's tile is 256 positions: 32 / lanes channel rows of `lanes` chunks. In shared memory a row also has the chunks
// to its right that windows reach, and begins at a multiple of 8 positions: the first output of a lane reads, with tap
// j, element shift + dilation * j of the lane's window, which begins at the lane's own chunk.
struct TimeTiles {
  Taps taps;
  int64_t tiles = 0;  // of a row of positions
  int shift, chunks;  // chunks: those of a window that the first output of a lane reads
  int lanes = 0;
  int chunk_bytes, row_bytes = 0, own_bytes, filter_pitch, warp_bytes = 0;

  // `size`: bytes of an element in shared memory; `own`: tensors of which a tile has the lanes' chunks alone; `spare`:
  // bytes that the tiles of a warp must have at least; `limit`: and at most; `stretch`: tiles of a row that come as
  // one, of 32 chunks each if they are more than one. No lanes if nothing fits.
  TimeTiles(const Taps& relation, int64_t time, int64_t channels, int size, int stages, int own, int spare,
            int64_t limit, int stretch)
      : taps(relation),
        shift(static_cast<int>((kEight - relation.left % kEight) % kEight)),
        chunks(static_cast<int>((shift + relation.span()) / kEight + 1)),
        chunk_bytes(kEight * size),
        own_bytes(own * stretch * 32 * chunk_bytes),
        // The odd number of vectors lets lanes read the filters of different rows without conflicts.
        filter_pitch(kEight * chunks + 4) {
    int64_t best = 0;
    for (int n = 32; n > (stretch > 1 ? 16 : 0) && 32 / n < 2 * channels; n /= 2) {
      const int bytes = bytes_of_row(n, stretch), rows = 32 / n;
      const int tile = stages * (rows * bytes + own_bytes),
                all = (tile < spare ? spare : tile) + rows * filter_pitch * 4;
      // Short rows are cut so that the least is copied and computed in vain.
      const int64_t count = (time + kEight * n - 1) / (kEight * n), cost = count * (n + chunks);
      if (all > limit || (lanes != 0 && cost >= best)) continue;
      best = cost;
      lanes = n;
      tiles = count;
      row_bytes = bytes;
      warp_bytes = all;
    }
  }

  // Whether a window is few elements side by side, which two chunks have.
  CK_HD bool few_taps() const { return taps.dilation == 1 && taps.taps <= kEight; }
  CK_HD int rows() const { return 32 / lanes; }
  CK_HD int stage_bytes() const { return rows() * row_bytes + own_bytes; }
  CK_HD int filter_bytes() const { return rows() * filter_pitch * 4; }
  CK_HD int mask_bytes() const { return (chunks + 15) / 16 * 16; }
  CK_HD int64_t channel_blocks(int64_t channels) const { return (channels + rows() - 1) / rows(); }

  // Positions of this family fit into 32 bits.
  CK_HD int window_start(int t) const { return static_cast<int>(taps.source(t, 0)) - shift; }
  CK_HD int element_of(int64_t j) const { return static_cast<int>(shift + taps.dilation * j); }
  // The tap that reads an element of the window, or -1.
  CK_HD int tap_at(int element) const {
    const int distance = element - shift, d = static_cast<int>(taps.dilation);
    return distance >= 0 && distance % d == 0 && distance / d < taps.taps ? distance / d : -1;
  }

 private:
  // Short rows take an odd multiple of the chunks that their lanes read at a time, so that 8 lanes find 8 different
  // banks.
  int bytes_of_row(int n, int stretch) const {
    const int all = n * stretch + chunks;
    return (n < 8 ? ((all + n - 1) / n | 1) * n : all) * chunk_bytes;
  }
};

// `ready`: x is gated or masked on its way, and kept in float32. `bulk`: tiles come by bulk copies.
inline TimeTiles forward_tiles(const Taps& taps, int64_t time, int64_t channels, int size, bool ready, bool bulk,
                               int64_t limit) {
  return {taps, time, channels, ready ? 4 : size, ready ? 1 : kTimeStages, 0, 0, limit, bulk ? kTimeStretch : 1};
}

// A warp has sums for a few chunks of the window at a time.
constexpr int kTimeFewChunks = 2, kTimeManyChunks = 4;

// Bytes for the sums of a warp, a column per element of the window. The odd pitch lets lanes write and read columns.
template <int kChunks>
constexpr int kTimeSumPitch = kChunks * kEight + 1;
template <int kChunks>
constexpr int kTimeSumBytes = (32 * kTimeSumPitch<kChunks> * 4 + 15) / 16 * 16;

inline bool few_chunks(const Taps& transposed) {
  return TimeTiles(transposed, 1, 1, 4, 1, 0, 0, INT32_MAX, 1).chunks <= kTimeFewChunks;
}

inline TimeTiles backward_tiles(const Taps& transposed, int64_t time, int64_t channels, int size, bool gate, bool bulk,
                                int64_t limit) {
  const int spare = few_chunks(transposed) ? kTimeSumBytes<kTimeFewChunks> : kTimeSumBytes<kTimeManyChunks>;
  return {transposed, time, channels, size, kTimeStages, gate ? 2 : 1, spare, limit, bulk ? kTimeStretch : 1};
}

}  // namespace ck::cuda
