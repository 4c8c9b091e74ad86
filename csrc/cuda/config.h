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
  bool per_position = false, renormalize = false, per_batch = false, gate = false, packed = false, state = false;
  // Every tensor like x can be read 16 bytes at a time along its channels, or along its positions.
  bool channel_vectors = true, time_vectors = false;

  bool per_row() const { return per_position || renormalize; }
  int64_t head_channels() const { return channels / heads; }
  int64_t owners() const { return per_batch && !per_position ? batch : 1; }
  int64_t owner_rows() const { return batch / owners() * time; }
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

// ---- stream: blocks of 128 channels, 32 rows at a time

constexpr int kQuad = 4;              // channels per thread
constexpr int kLaneRow = 32 * kQuad;  // channels of a warp, and of a block
constexpr int kRun = 8;               // consecutive rows of a thread
constexpr int kStreamWarps = 4, kStreamThreads = 32 * kStreamWarps;
constexpr int kChunk = kStreamWarps * kRun;  // rows that are copied, and computed, at a time
constexpr int kAhead = 2;                    // chunks on their way while one is computed

// Filters with at most this many taps have the sums for their gradient in registers, longer ones in shared memory.
constexpr int kFewTaps = kRun;

// Chunks that the windows of a chunk of outputs reach into.
CK_HD int64_t stream_window(int64_t taps) { return 1 + (taps - 1 + kChunk - 1) / kChunk; }

// Bytes of shared memory; `size`: of an element, `shared`: heads are whole quads, which then have one filter value.
CK_HD int64_t stream_table_pitch(bool shared) { return shared ? kLaneRow / kQuad + 1 : kLaneRow; }
CK_HD int64_t stream_table_bytes(int64_t taps, bool shared) {
  return (taps * stream_table_pitch(shared) * 4 + 15) / 16 * 16;
}
CK_HD int64_t stream_chunk_bytes(int64_t size) { return kChunk * kLaneRow * size; }
CK_HD int64_t stream_sum_bytes(int64_t taps, bool shared) { return taps * kStreamThreads * (shared ? 1 : kQuad) * 4; }

CK_HD int64_t stream_forward_bytes(int64_t taps, int64_t size, bool shared, bool gate) {
  const int64_t window = stream_window(taps);
  return stream_table_bytes(taps, shared) +
         (gate ? window * stream_chunk_bytes(4) + 2 * (1 + kAhead) * stream_chunk_bytes(size)
               : (window + kAhead) * stream_chunk_bytes(size));
}

CK_HD int64_t stream_backward_bytes(int64_t taps, int64_t size, bool shared, bool gate) {
  const int64_t rings = (stream_window(taps) + kAhead + (gate ? 2 : 1) * (1 + kAhead)) * stream_chunk_bytes(size);
  const int64_t sums = stream_sum_bytes(taps, shared);
  // Sums from registers, and those of the bias, are laid over the rings at the end.
  const int64_t end = taps <= kFewTaps ? sums : kStreamThreads * kQuad * 4;
  return stream_table_bytes(taps, shared) + (taps <= kFewTaps ? 0 : sums) + (rings < end ? end : rings);
}

// Chunks of an owner's batch rows, phase by phase.
inline int64_t stream_chunks(const Facts& f) {
  const int64_t rows = (f.time + f.dilation - 1) / f.dilation;
  return f.batch / f.owners() * f.dilation * ((rows + kChunk - 1) / kChunk);
}

// What a block has on every architecture served.
constexpr int64_t kSharedMemory = 160 << 10;

inline bool stream_possible(const Facts& f, bool backward) {
  if (!f.channel_vectors || f.dtype == Dtype::kFloat64 || f.per_row()) return false;
  // Rows of the state are neither gated nor in the middle of a row.
  if (f.state && (f.gate || f.packed || backward)) return false;
  const bool shared = f.head_channels() % kQuad == 0;
  const int64_t size = size_of(f.dtype);
  return (backward ? stream_backward_bytes(f.taps, size, shared, f.gate)
                   : stream_forward_bytes(f.taps, size, shared, f.gate)) <= kSharedMemory;
}

inline Plan stream_plan(const Facts& f) {
  const int64_t blocks = (f.channels + kLaneRow - 1) / kLaneRow * f.owners(), chunks = stream_chunks(f);
  // Blocks of few chunks would spend their time on halos and filters.
  const int64_t possible = at_least_one(chunks / 4), wanted = at_least_one(kBlocks / blocks);
  return {Family::kStream, wanted < possible ? wanted : possible};
}

// ---- band: blocks of 32 or 64 channels of a head, 64 rows at a time

constexpr int kBandTile = 16;  // rows of a product
constexpr int kBandWarps = 4, kBandThreads = 32 * kBandWarps;
constexpr int kBandRows = kBandWarps * kBandTile;  // rows that are copied, and computed, at a time
constexpr int kBandUnit = 32;                      // channels that a warp computes at a time

// Windows of a chunk reach no further than the next one. Below the fewest, additions and multiplications take less time
// than the memory, in either direction, and the zeros of the band would be most of the work.
constexpr int64_t kBandFewest = 12, kBandMost = kBandRows + 1;
constexpr int kBandSteps = kBandWarps + 1;  // tiles that the window of a tile reaches, at most
// Up to this many taps a window is three tiles, and sums for d(filter) take fewer registers.
constexpr int64_t kBandShort = 33;

// Terms of bfloat16 that make up a number: one of its own, two of float16, three of float32.
CK_HD constexpr int band_parts(bool float16, bool gate) { return gate ? 3 : float16 ? 2 : 1; }

// Channels of a block of heads of R channels. Two units share a row of shared memory where neither would be empty;
// rows in several parts are narrow, so that two blocks and more have room on a processor.
CK_HD int band_width(int64_t R, int parts) {
  return parts == 1 && (R - 1) % (2 * kBandUnit) >= kBandUnit ? 2 * kBandUnit : kBandUnit;
}
CK_HD int64_t band_pieces(int64_t R, int parts) {
  const int64_t width = band_width(R, parts);
  return (R + width - 1) / width;
}

// From row to row of shared memory: eight rows begin at different multiples of 16 bytes, modulo 128.
CK_HD int band_pitch(int width) { return width + 8; }

inline bool band_possible(const Facts& f) {
  const bool narrow = f.dtype == Dtype::kBFloat16 || f.dtype == Dtype::kFloat16;
  const int64_t R = f.head_channels();
  if (!narrow || f.per_row() || !f.channel_vectors || f.taps > kBandMost || R < kBandTile || R % 8 != 0) return false;
  return !f.state || !(f.packed || f.gate);
}

inline bool band_wanted(const Facts& f) { return f.taps >= kBandFewest && band_possible(f); }

// `parts`: of the tensor that decides how wide a block is.
inline Plan band_plan(const Facts& f, int parts) {
  const int64_t blocks = f.heads * band_pieces(f.head_channels(), parts) * f.owners();
  const int64_t chunks =
      f.owner_rows() / f.time * f.dilation * ((f.time + f.dilation * kBandRows - 1) / (f.dilation * kBandRows));
  const int64_t possible = at_least_one(chunks / 2), wanted = at_least_one(kBlocks / blocks);
  return {Family::kBand, wanted < possible ? wanted : possible};
}

inline Plan plan_forward(const Facts& f) {
  if (band_wanted(f)) return band_plan(f, band_parts(f.dtype == Dtype::kFloat16, f.gate));
  if (stream_possible(f, false)) return stream_plan(f);
  return {};
}

inline Plan plan_backward(const Facts& f) {
  if (band_wanted(f)) return band_plan(f, band_parts(f.dtype == Dtype::kFloat16, f.gate));
  if (stream_possible(f, true)) return stream_plan(f);
  const int64_t columns = f.per_row() ? f.heads / 8 : f.channels / 32 * ((f.taps + 7) / 8);
  return {Family::kPlain, groups_of(f.owner_rows(), columns)};
}

}  // namespace ck::cuda
