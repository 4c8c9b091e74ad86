// Which kernels run a problem, and how the work is split: plain data, chosen by pure functions of the problem and the
// device, testable on any host.
//
//   owner   a set of filters that positions share: one, or one per batch row
//   group   a part of an owner's positions: a block computes it, and makes one partial sum of it
//   piece   a part of a head's channels, where a head has more than a block
//   chunk   the rows that a block copies, and computes, at a time
#pragma once

#include "csrc/cuda/conv/band_shape.h"
#include "csrc/cuda/conv/problem.h"
#include "csrc/cuda/conv/time_tiles.h"
#include "csrc/cuda/device/device.h"

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
  // Bytes, 16 at most, at which every tensor like x can be read and written along its channels, or along its positions;
  // 0 where these do not lie side by side. Rows have a whole number of such pieces.
  int64_t channel_bytes = 16, time_bytes = 0;
  int64_t weight_bytes = 4;  // of a logit
  Device device;

  bool per_row() const { return per_position || renormalize; }
  int64_t head_channels() const { return channels / heads; }
  int64_t owners() const { return per_batch && !per_position ? batch : 1; }
  int64_t owner_rows() const { return batch / owners() * time; }
};

struct Plan {
  Family family = Family::kPlain;
  int64_t groups = 1;        // of an owner's positions
  int64_t shared_bytes = 0;  // of a block; of the time family, what its tiles may take
  int64_t lanes = 0;         // of the rows family: of a warp, that a head has
  int64_t units = 0;         // of the band family: warps of a block
  bool bulk = false;         // of the time family: tiles of x, or of gradients, come by bulk copies
};

inline int64_t at_least_one(int64_t n) { return n < 1 ? 1 : n; }

// Groups for sums over `rows` positions in each of `columns` blocks: enough to fill a device, of at least 64 positions.
inline int64_t groups_of(const Facts& f, int64_t rows, int64_t columns) {
  const int64_t wanted = at_least_one(8 * f.device.multiprocessors / at_least_one(columns)),
                possible = at_least_one(rows / 64);
  return wanted < possible ? wanted : possible;
}

// Groups of work that is `units` long, in each of `columns` columns, for a device that runs `slots` blocks at a time:
// as many as make the last block end soonest, if a block costs `overhead` units besides its own, and no more than an
// owner has positions (phases without any are units as well).
inline int64_t best_groups(const Facts& f, int64_t units, int64_t columns, int64_t slots, int64_t overhead) {
  int64_t best = 1, min_time = INT64_MAX;
  const int64_t possible = at_least_one(units < f.owner_rows() ? units : f.owner_rows());
  for (int64_t waves = 1; waves <= 8; ++waves) {
    const int64_t fit = at_least_one(waves * slots / columns), groups = fit < possible ? fit : possible;
    const int64_t time = (columns * groups + slots - 1) / slots * ((units + groups - 1) / groups + overhead);
    if (time < min_time) {
      min_time = time;
      best = groups;
    }
  }
  return best;
}

// Blocks that run at a time, each of `bytes` of shared memory, where registers allow `limit` per multiprocessor.
inline int64_t slots_of(const Facts& f, int64_t bytes, int64_t limit) {
  const int64_t fit = at_least_one(f.device.memory / (bytes + 1024));  // a block takes 1 KB more than it asks for
  return f.device.multiprocessors * (fit < limit ? fit : limit);
}

// stream: blocks of 128 channels, 32 rows at a time

constexpr int kQuad = 4;              // channels per thread
constexpr int kLaneRow = 32 * kQuad;  // channels of a warp, and of a block at most
constexpr int kRun = 8;               // consecutive rows of a thread
constexpr int kStreamWarps = 4, kStreamThreads = 32 * kStreamWarps;
constexpr int kChunk = kStreamWarps * kRun;  // rows that are copied, and computed, at a time
constexpr int kAhead = 2;                    // chunks that are copied while one is computed

// How channels are cut into blocks: from every `span`-th on, `pieces` blocks of `width` channels, of which the last may
// have fewer.
struct Columns {
  int64_t span, width;
  uint32_t pieces, blocks;

  CK_HD Columns(int64_t channels, int64_t span, int64_t width, int64_t pieces)
      : span(span),
        width(width),
        pieces(static_cast<uint32_t>(pieces)),
        blocks(static_cast<uint32_t>((channels + span - 1) / span * pieces)) {}
  CK_HD explicit Columns(int64_t channels) : Columns(channels, kLaneRow, kLaneRow, 1) {}
};

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

// Chunks of an owner's batch rows, phase by phase. A backward pass also walks the rows of the state.
inline int64_t stream_chunks(const Facts& f, bool backward) {
  const int64_t rows = (f.time + f.dilation - 1) / f.dilation + (f.state && backward ? f.taps - 1 : 0);
  return f.batch / f.owners() * f.dilation * ((rows + kChunk - 1) / kChunk);
}

inline int64_t stream_bytes(const Facts& f, bool backward) {
  const bool shared = f.head_channels() % kQuad == 0;
  return (backward ? stream_backward_bytes : stream_forward_bytes)(f.taps, size_of(f.dtype), shared, f.gate);
}

inline bool stream_possible(const Facts& f, bool backward) {
  if (f.channel_bytes == 0 || f.dtype == Dtype::kFloat64 || f.per_row() || f.dilation > f.time) return false;
  // Rows of the state are neither gated nor in the middle of a row.
  if (f.state && (f.gate || f.packed)) return false;
  return stream_bytes(f, backward) <= f.device.block_memory;
}

// Blocks per multiprocessor that registers allow: 128 threads of at most 168, or 255.
constexpr int64_t kForwardBlocks = 3, kBackwardBlocks = 2;

inline Plan walk_plan(Family family, const Facts& f, bool backward, const Columns& cut, int64_t bytes, int64_t blocks) {
  const int64_t columns = cut.blocks * f.owners();
  // A block fills its window, makes its filters and adds up its sums besides.
  return {family,
          best_groups(f, stream_chunks(f, backward), columns, slots_of(f, bytes, blocks), stream_window(f.taps) + 1),
          bytes};
}

inline Plan stream_plan(const Facts& f, bool backward) {
  return walk_plan(Family::kStream, f, backward, Columns(f.channels), stream_bytes(f, backward),
                   backward ? kBackwardBlocks : kForwardBlocks);
}

// rows: blocks as of the stream kernels, which hold whole heads, or a piece of one that is longer than a block

// Blocks that share a head of R channels.
inline int64_t rows_pieces(int64_t R) { return (R + kLaneRow - 1) / kLaneRow; }
// lanes: of a warp, that a head has.
inline Columns rows_columns(int64_t channels, int64_t R, int64_t lanes) {
  const int64_t pieces = rows_pieces(R), whole = 32 / lanes * R;
  if (pieces == 1) return {channels, whole, whole, 1};
  return {channels, R, ((R + pieces - 1) / pieces + 7) / 8 * 8, pieces};  // whole vectors, of 16 bits as well
}

// Chunks of inputs that are copied while one is computed: in float32 no more fit beside d(y), x, the gate and z.
CK_HD constexpr int rows_ahead(int64_t size, bool gate, bool backward) {
  return size == 4 && gate && backward ? 1 : kAhead;
}
constexpr int kFiltersAhead = 1;  // chunks of logits that are copied while one is computed
CK_HD int64_t rows_pitch(int64_t taps) { return taps / 2 * 2 + 1; }
// Filters of `rows` rows.
CK_HD int64_t rows_table_bytes(int64_t taps, int64_t lanes, int64_t rows = kChunk) {
  return (rows * (32 / lanes) * rows_pitch(taps) * 4 + 15) / 16 * 16;
}

inline int64_t rows_bytes(const Facts& f, int64_t lanes, bool backward) {
  const int64_t size = size_of(f.dtype), window = stream_window(f.taps), table = rows_table_bytes(f.taps, lanes);
  const int64_t ahead = rows_ahead(size, f.gate, backward);
  const int64_t input = f.gate ? window * stream_chunk_bytes(4) + 2 * (1 + ahead) * stream_chunk_bytes(size)
                               : (window + ahead) * stream_chunk_bytes(size);
  // Where positions share filters, a warp keeps those of whole windows, and sums for their gradient.
  const int64_t own = f.per_position ? 0 : kStreamWarps;
  if (!backward) return rows_table_bytes(f.taps, lanes, (1 + kFiltersAhead) * kChunk + own) + input;
  return (window + kFiltersAhead + 1) * table + rows_table_bytes(f.taps, lanes, 2 * own) +
         (window + ahead) * stream_chunk_bytes(size) + input;
}

// Lanes of a head: a power of two, for sums over them. The fewest that its quads need, or more, for fewer filters per
// block, until these fit; 0 if nothing does. The others are idle.
inline int64_t rows_lanes(const Facts& f, bool backward) {
  const int64_t R = f.head_channels();
  if (R % kQuad != 0) return 0;  // a lane serves one head
  for (int64_t lanes = 1; lanes <= 32; lanes *= 2) {
    const bool enough = lanes == 32 || lanes * kQuad >= R;
    if (enough && rows_bytes(f, lanes, backward) <= f.device.block_memory) return lanes;
  }
  return 0;
}

inline bool rows_possible(const Facts& f, bool backward) {
  if (f.channel_bytes == 0 || f.dtype == Dtype::kFloat64 || !f.per_row() || f.dilation > f.time) return false;
  if (f.state && (f.gate || f.packed)) return false;
  return rows_lanes(f, backward) != 0;
}

inline Plan rows_plan(const Facts& f, bool backward) {
  const int64_t lanes = rows_lanes(f, backward);
  Plan plan = walk_plan(Family::kRows, f, backward, rows_columns(f.channels, f.head_channels(), lanes),
                        rows_bytes(f, lanes, backward), kBackwardBlocks);
  plan.lanes = lanes;
  return plan;
}

// band: shapes in band_shape.h

// Of filters that positions share, the fewest: with 43 TFLOP/s, which is what threads reach, a tap costs 0.046 ps per
// element forward and 0.092 backward; the memory of an H200 takes 0.83 ps and 1.25 ps, so that threads keep up to 18
// and 13 taps, fewer if the two do not overlap. Matrices take 0.3 ps with up to 17 taps.
constexpr int64_t kBandMinTaps = 12;

inline BandShape band_shape(const Facts& f) { return {f.taps, f.head_channels(), f.dtype == Dtype::kFloat16, f.gate}; }
inline BandShape band_shape(const Problem& p) {
  return {p.taps.taps, p.head_channels(), p.dtype == Dtype::kFloat16, p.gate.data != nullptr};
}

inline int64_t band_bytes(const Facts& f, bool backward, int units) {
  const bool float16 = f.dtype == Dtype::kFloat16;
  const BandShape shape = band_shape(f);
  // Backward two tiles of gradients besides.
  const int tiles = !f.per_position ? 0 : backward ? 1 + kBandGradAhead + 2 : 1 + kBandAhead;
  return tiles * kBandTile * band_logit_pitch(f.taps, band_heads(shape.pieces, units), f.weight_bytes) +
         units * (backward ? band_backward_bytes(shape, float16, f.gate, f.per_position, f.taps)
                           : band_forward_bytes(shape, f.gate));
}

// Blocks per multiprocessor that registers allow: 128 threads of at most 168, or 255.
constexpr int64_t kBandForwardBlocks = 3, kBandBackwardBlocks = 2;

// Units of a block, a power of two so that rows of their logits are whole words: as many as fit, or fewer where many
// more warps run at a time then; 0 if not even one fits.
inline int band_units(const Facts& f, bool backward) {
  int best = 0;
  int64_t most = 0;
  for (int units = kBandWarps; units > 0; units /= 2) {
    const int64_t bytes = band_bytes(f, backward, units) + kBandStatic, fit = f.device.memory / (bytes + 1024);
    const int64_t limit = (backward ? kBandBackwardBlocks : kBandForwardBlocks) * kBandWarps / units,
                  warps = (fit < limit ? fit : limit) * units;
    if (bytes > f.device.block_memory || warps <= most + most / 4) continue;
    best = units;
    most = warps;
  }
  return best;
}

// Tiles of an owner's batch rows, phase by phase, at most: a backward pass also walks what windows reach.
inline int64_t band_tiles(const Facts& f, bool backward) {
  const int64_t rows = (f.time + f.dilation - 1) / f.dilation + (backward ? 2 * (f.taps - 1) : 0);
  return f.batch / f.owners() * f.dilation * ((rows + kBandTile - 1) / kBandTile);
}

inline bool band_possible(const Facts& f, bool backward) {
  const bool narrow = f.dtype == Dtype::kBFloat16 || f.dtype == Dtype::kFloat16;
  const int64_t R = f.head_channels();
  if (!narrow || f.renormalize || f.channel_bytes == 0 || f.taps > (f.per_position ? kBandShort : kBandMaxTaps) ||
      R < kBandTile || R % 8 != 0)
    return false;
  // Tiles, and the rows of a run, are counted in 32 bits.
  if (f.dilation > f.time || band_tiles(f, backward) > kFarthest / kBandTile) return false;
  return !(f.state && (f.packed || f.gate)) && f.weight_bytes <= 4 && band_units(f, backward) != 0;
}

inline bool band_wanted(const Facts& f, bool backward) {
  return band_possible(f, backward) && (f.per_position || f.taps >= kBandMinTaps || !stream_possible(f, backward));
}

inline Plan band_plan(const Facts& f, bool backward) {
  const BandShape shape = band_shape(f);
  const int units = band_units(f, backward);
  const int64_t bytes = band_bytes(f, backward, units);
  const int64_t columns = (f.heads * shape.pieces + units - 1) / units * f.owners();
  // A block makes its filters, waits for its first rows, and reads a halo besides.
  Plan plan{Family::kBand,
            best_groups(f, band_tiles(f, false), columns,
                        slots_of(f, bytes + kBandStatic,
                                 (backward ? kBandBackwardBlocks : kBandForwardBlocks) * kBandWarps / units),
                        shape.steps + 2),
            bytes};
  plan.units = units;
  return plan;
}

// time: a warp per piece of a few channel rows

constexpr int64_t kTimeWarpBytes = 32 << 10;  // bytes of shared memory at most

// Of a block's shared memory, what a warp gets; the rest is for masks.
inline int64_t time_warp_bytes(const Device& device) {
  const int64_t bytes = (device.block_memory - (1 << 10)) / kTimeWarps;
  return bytes < kTimeWarpBytes ? bytes : kTimeWarpBytes;
}

// Rows of the state have their channels side by side; they are left to the plain family.
inline bool time_possible(const Facts& f, bool backward) {
  if (f.time_bytes == 0 || f.dtype == Dtype::kFloat64 || f.per_row() || f.state) return false;
  const int64_t bytes = time_warp_bytes(f.device), span = f.dilation * (f.taps - 1);
  const int size = static_cast<int>(size_of(f.dtype));
  if (span > kTimeSpan || f.time > kFarthest) return false;
  // Of all paddings, the one whose windows reach the most chunks.
  const Taps taps{f.taps, 1, f.dilation};
  return backward ? backward_tiles(taps, f.time, f.channels, size, f.gate, false, bytes).lanes != 0
                  : forward_tiles(taps, f.time, f.channels, size, false, false, bytes).lanes != 0 &&
                        forward_tiles(taps, f.time, f.channels, size, true, false, bytes).lanes != 0;
}

// Whether tiles come by bulk copies: those that are 32 chunks of one row, and that lanes read without conflicts as they
// lie in memory.
inline bool time_bulk(const Facts& f, bool backward) {
  if (!f.device.bulk_copies || f.time_bytes != 16 || size_of(f.dtype) != 2) return false;
  const Taps taps{f.taps, 1, f.dilation};
  const auto tiles = [&](bool bulk) {
    const int64_t bytes = time_warp_bytes(f.device);
    return backward ? backward_tiles(taps, f.time, f.channels, 2, f.gate, bulk, bytes)
                    : forward_tiles(taps, f.time, f.channels, 2, false, bulk, bytes);
  };
  return tiles(false).lanes == 32 && tiles(true).lanes == 32;
}

inline Plan time_plan(const Facts& f, bool backward) {
  const int64_t bytes = time_warp_bytes(f.device);
  const Taps taps{f.taps, 0, f.dilation};
  const TimeTiles g = forward_tiles(taps, f.time, f.channels, static_cast<int>(size_of(f.dtype)), false, false, bytes);
  const int64_t warps = g.channel_blocks(f.channels) * f.owners();
  // A warp that has two tiles at least copies one while it computes the other.
  const int64_t possible = at_least_one(f.batch / f.owners() * g.tiles / 2),
                items = kTimeItems * f.device.multiprocessors, wanted = (items + warps - 1) / warps;
  Plan plan{Family::kTime, wanted < possible ? wanted : possible, kTimeWarps * bytes};
  plan.bulk = time_bulk(f, backward);
  // Whole stretches of tiles, where a group has more than one.
  const int64_t all = f.batch / f.owners() * g.tiles, each = (all + plan.groups - 1) / plan.groups;
  if (plan.bulk && each > kTimeStretch)
    plan.groups = (all - 1) / ((each + kTimeStretch - 1) / kTimeStretch * kTimeStretch) + 1;
  return plan;
}

// The first family that can run the problem. Time before stream: a single channel is a row of positions.
inline Plan plan_forward(const Facts& f) {
  if (band_wanted(f, false)) return band_plan(f, false);
  if (rows_possible(f, false)) return rows_plan(f, false);
  if (time_possible(f, false)) return time_plan(f, false);
  if (stream_possible(f, false)) return stream_plan(f, false);
  return {};
}

inline Plan plan_backward(const Facts& f) {
  if (band_wanted(f, true)) return band_plan(f, true);
  if (rows_possible(f, true)) return rows_plan(f, true);
  if (time_possible(f, true)) return time_plan(f, true);
  if (stream_possible(f, true)) return stream_plan(f, true);
  const int64_t columns = f.per_row() ? f.heads / 8 : f.channels / 32 * ((f.taps + 7) / 8);
  return {Family::kPlain, groups_of(f, f.owner_rows(), columns)};
}

}  // namespace ck::cuda
