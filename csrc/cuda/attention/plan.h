// Which kernels run an attention, and how the work is split: plain data, chosen by pure functions of the problem and
// the device, testable on any host. A part is the share of one block (of a warp, for the tensor kernels' gradients) of
// a head's tiles.
#pragma once

#include "csrc/common/attention.h"
#include "csrc/cuda/device/device.h"

namespace ck::cuda {

enum class AttentionFamily : int8_t {
  kPlain,      // any problem
  kTensor,     // types of up to 32 bits on tensor cores
  kWarpgroup,  // 16-bit types, for compute capability 9.0
};

inline const char* name_of(AttentionFamily family) {
  return family == AttentionFamily::kPlain ? "plain" : family == AttentionFamily::kTensor ? "tensor" : "warpgroup";
}

// What the choice depends on.
struct AttentionFacts {
  int64_t batch = 1, queries = 1, keys = 1, heads = 1, groups = 1, channels = 64, rank = 64, window = 1, sequences = 1;
  Dtype dtype = Dtype::kBFloat16;
  // relative: some relative term, low_rank: rel_query
  bool packed = false, relative = false, query_rel = false, key_rel = false, low_rank = false;
  bool positive_scale = true;
  bool boxes = true;  // tensor_load can read q, k and v
  Device device;
};

struct AttentionPlan {
  AttentionFamily family = AttentionFamily::kPlain;
  AttentionFamily key_family = AttentionFamily::kPlain;  // of the pass over the keys; family is that of the queries
  int64_t channels = 0;                                  // of the tensor kernels, padded
  int64_t kernel_channels = 0;                           // their template argument: 64, 128, 192 or 256
  bool resident = false;                                 // the forward pass keeps all keys and values in shared memory
  int64_t stages = 0, key_stages = 0;                    // of others in shared memory, of the kernels for warpgroups
  int64_t shared_bytes = 0;                              // of a block of the tensor kernels
  int64_t strip_pitch = 0, grad_pitch = 0;
  int64_t key_shared_bytes = 0;  // of the pass over the keys; shared_bytes is that of the queries
  // Partial sums for tables, which are added at the end; query_parts of a forward pass of warpgroups: its blocks.
  int64_t query_parts = 1, key_parts = 1;
  int64_t tap_parts = 1;
};

// Tiles of `size` positions, where each of the sequences may begin a new one.
inline int64_t attention_tiles(int64_t positions, int64_t sequences, bool packed, int64_t size) {
  return packed ? positions / size + sequences : (positions + size - 1) / size;
}

// plain: tiles of 16 queries and 32 keys

constexpr int kPlainTileRows = 16, kPlainTileKeys = 32;
constexpr int kPlainTileWarps = 4, kPlainTileThreads = 32 * kPlainTileWarps;
constexpr int kPlainPitch = 33;   // from row to row of 32 channels, or keys, in shared memory
constexpr int kPlainSlice = 128;  // channels of the results that a block makes

inline int64_t plain_slices(int64_t channels) { return (channels + kPlainSlice - 1) / kPlainSlice; }

// Numbers of the accumulation type in shared memory.
constexpr int64_t kPlainPairs = (kPlainTileRows + kPlainTileKeys) * (kPlainPitch + 2) + kPlainTileRows * kPlainPitch;
constexpr int64_t kPlainWeights = kPlainTileRows * kPlainPitch;
constexpr int64_t kPlainForwardNumbers = kPlainPairs + kPlainWeights + kPlainTileRows * kPlainSlice;
constexpr int64_t kPlainQueryNumbers =
    kPlainPairs + kPlainWeights + 2 * kPlainTileRows * kPlainSlice + 2 * kPlainTileRows;
constexpr int64_t kPlainKeyNumbers =
    kPlainPairs + 2 * kPlainWeights + 2 * kPlainTileThreads + 2 * kPlainTileKeys * kPlainSlice;

// tensor: tiles of 64 or 128 queries

constexpr int kTensorWarps = 4, kTensorThreads = 32 * kTensorWarps;
constexpr int64_t kTensorRank = 128, kResidentKeys = 256;  // at most
// Bytes of a head's channels, at most. With more than kNarrowHead it is wide: sums of two gradients do not fit into
// registers.
constexpr int64_t kTensorHead = 512, kNarrowHead = 256;
template <class T>
constexpr int kTensorChannels = static_cast<int>(kTensorHead / sizeof(T));
template <class T, int D>
constexpr bool kWide = D * static_cast<int>(sizeof(T)) > kNarrowHead;

constexpr int kForwardKeys = 32;  // of a tile
// Fragments of 16 queries of a warp: more share what is read of the keys, and take registers.
template <class T, int D>
constexpr int kForwardFragments = D <= 64 && sizeof(T) == 2 ? 2 : 1;
template <class T, int D>
constexpr int kForwardRows = 16 * kForwardFragments<T, D> * kTensorWarps;

inline int64_t forward_rows(int64_t channels, Dtype dtype) {
  return channels > 64 || size_of(dtype) > 2 ? kForwardRows<float, 64> : kForwardRows<bf16, 64>;
}

CK_HD constexpr int64_t round_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Columns that the pairs of 16 queries and a tile of keys have, in whole fragments; odd, against bank conflicts.
inline int64_t strip_pitch_of(int64_t window, int64_t keys) {
  return round_to(window < keys + 15 ? window : keys + 15, 8) + 1;
}

// The backward passes: a block has 64 queries and walks over 32 keys at a time, or 64 keys and 32 queries.
constexpr int kGradRows = 16 * kTensorWarps, kGradOthers = 32;
// Gradients of windows up to this size stay in shared memory until the walk over all keys, or queries, is done.
constexpr int64_t kWholeStrip = 64;

constexpr int kWarpTileBytes = 96;  // of a warp's WarpTile

// One column of gradients for each that the window has, or that pairs of a tile have. others: those that a block meets
// at a time.
CK_HD constexpr int64_t grad_columns(int64_t window, int64_t others) {
  return window <= kWholeStrip || window < others + 15 ? window : others + 15;
}
CK_HD constexpr int64_t grad_pitch_of(int64_t window, int64_t others) {
  return round_to(grad_columns(window, others), 16) + 1;
}

inline int64_t padded_rank(const AttentionFacts& f, int64_t channels) {
  return f.low_rank ? round_to(f.rank, 16) : channels;
}

inline int64_t forward_bytes(const AttentionFacts& f, const AttentionPlan& plan, int64_t stages) {
  const int64_t size = size_of(f.dtype), row = size * plan.kernel_channels + 16;
  const int64_t rel_row = f.low_rank ? size * padded_rank(f, plan.channels) + 16 : 0;
  return forward_rows(plan.channels, f.dtype) * (row + rel_row) + stages * 2 * kForwardKeys * row +
         4 * kTensorWarps * 16 * plan.strip_pitch;
}

// warpgroup: tiles of 128 queries and 128 keys, 64 queries for each warpgroup that makes products; another one copies

constexpr int kWarpgroupRows = 128, kWarpgroupKeys = 128;
constexpr int kWarpgroupWarps = 8, kWarpgroupThreads = 128 + 32 * kWarpgroupWarps;
constexpr int kTurnThreads = 32 * kWarpgroupWarps;
// Registers of a thread: of 65536, 384 threads have 168 each when they start.
constexpr int kCopyRegisters = 24, kProductRegisters = 240;
constexpr int kMostStages = 4;
// Keys that a block of queries meets at a time in the backward pass, and queries that a block of keys meets.
constexpr int kWarpgroupGradKeys = 64;
template <int D>
constexpr int kWarpgroupQueries = D <= 64 ? 64 : 32;
// In the pass over the keys a second warp copies.
constexpr int kKeyCopyRegisters = 40, kKeyProductRegisters = 232;
// Of a strip of 16 queries by the columns that they have with so many keys, in whole fragments: see PairStrip.
CK_HD constexpr int pair_strip_pitch(int keys) { return keys + 24; }
constexpr int kStageFloats = 512;   // of a warp's results on their way out
constexpr int kSignalBytes = 1024;  // of a block, in front of the tiles, which begin at multiples of it

inline int64_t warpgroup_bytes(const AttentionFacts& f, const AttentionPlan& plan, int64_t stages) {
  const int64_t row = 2 * plan.kernel_channels, strip = 4 * 16 * plan.strip_pitch;
  return kWarpgroupRows * (row + (f.low_rank ? 2 * (padded_rank(f, plan.channels) + 8) : 0)) +
         stages * 2 * kWarpgroupKeys * row + kWarpgroupWarps * (strip < 4 * kStageFloats ? 4 * kStageFloats : strip) +
         kSignalBytes;
}

// Floats per row of a warp's strips in the backward passes: of the scores, and behind them of their gradients. Where
// the latter are added up after each tile they take the place of the former.
CK_HD constexpr int64_t query_score_pitch(int64_t window, int64_t strip_pitch) {
  return strip_pitch >= window + 2 ? strip_pitch : pair_strip_pitch(kWarpgroupGradKeys);
}
CK_HD constexpr int64_t strips_pitch(int64_t window, int64_t scores, int64_t grads) {
  return window <= kWholeStrip ? scores + grads : scores < grads ? grads : scores;
}
CK_HD constexpr int64_t query_strips_pitch(int64_t window, int64_t strip_pitch) {
  return strips_pitch(window, query_score_pitch(window, strip_pitch), grad_pitch_of(window, kWarpgroupGradKeys));
}
// In the pass over the keys with a key_rel, also what lanes have summed beside the window.
constexpr int kOuterPitch = 8;
CK_HD constexpr int64_t key_strips_pitch(int64_t window, int64_t queries, bool key_rel) {
  return strips_pitch(window, pair_strip_pitch(16), key_rel ? grad_pitch_of(window, queries) : 0) +
         (key_rel ? kOuterPitch : 0);
}

inline int64_t warpgroup_backward_bytes(const AttentionFacts& f, const AttentionPlan& plan, bool keys, int64_t stages) {
  const int64_t others = !keys                        ? kWarpgroupGradKeys
                         : plan.kernel_channels == 64 ? kWarpgroupQueries<64>
                                                      : kWarpgroupQueries<128>;
  const int64_t row = 2 * plan.kernel_channels, rank = f.low_rank ? padded_rank(f, plan.channels) : 0;
  const int64_t strips = f.relative ? 16 * (keys ? key_strips_pitch(f.window, others, f.key_rel)
                                                 : query_strips_pitch(f.window, plan.strip_pitch))
                                    : 0;
  const int64_t rel_row = f.low_rank ? 2 * (rank + 8) : 0, sums = f.low_rank && !keys ? 16 * (rank + 4) : 0;
  return kSignalBytes + kWarpgroupRows * 2 * row + stages * others * (2 * row + (keys ? 16 + rel_row : 0)) +
         4 * kWarpgroupWarps * ((strips < kStageFloats ? kStageFloats : strips) + sums) +
         (keys ? 0 : kWarpgroupRows * rel_row);
}

inline bool is_wide(const AttentionFacts& f, const AttentionPlan& plan) {
  return plan.kernel_channels * size_of(f.dtype) > kNarrowHead;
}

// Whether the sums of warps lie where the others' rows lay: if they fit and nothing is added before the walk is done.
inline bool sums_in_ring(const AttentionFacts& f, const AttentionPlan& plan, bool keys) {
  if (keys) return !f.key_rel || f.window <= kWholeStrip;
  return (!f.relative || f.window <= kWholeStrip) && padded_rank(f, plan.channels) <= plan.kernel_channels;
}

inline int64_t backward_bytes(const AttentionFacts& f, const AttentionPlan& plan, bool keys) {
  const int64_t size = size_of(f.dtype), row = size * plan.kernel_channels + 16, rank = padded_rank(f, plan.channels);
  const int64_t rel_row = f.low_rank ? size * rank + 16 : 0;
  const int64_t own = kGradRows * (2 * row + (keys ? 0 : rel_row));
  const int64_t others = 2 * kGradOthers * (2 * row + (keys ? rel_row : 0));
  const int64_t sums = sums_in_ring(f, plan, keys) ? 0 : (keys || rank < plan.channels ? plan.channels : rank) + 4;
  const int64_t grads = keys && !f.key_rel ? 0 : plan.grad_pitch;
  return own + others + kTensorWarps * kWarpTileBytes + (keys ? 4 * 2 * 4 * kGradOthers : 0) +
         4 * kTensorWarps * 16 * (plan.strip_pitch + grads + sums);
}

// Whether there are kernels for warpgroups, if shared memory suffices.
inline bool has_warpgroups(const AttentionFacts& f, const AttentionPlan& plan) {
  return f.device.warpgroups && f.boxes && size_of(f.dtype) == 2 && !is_wide(f, plan);
}

// Replaces the kernels of a plan by those for warpgroups, where these can run.
inline void use_warpgroups(AttentionPlan& plan, const AttentionFacts& f, bool backward) {
  if (!has_warpgroups(f, plan)) return;
  // As many stages as there is room for.
  const auto replace = [&](AttentionFamily& family, int64_t& stages, int64_t& shared_bytes, const auto& bytes) {
    for (int64_t n = kMostStages; n > 1; --n)
      if (bytes(n) <= f.device.block_memory) {
        family = AttentionFamily::kWarpgroup;
        stages = n;
        shared_bytes = bytes(n);
        return;
      }
  };
  if (!backward) {
    replace(plan.family, plan.stages, plan.shared_bytes, [&](int64_t n) { return warpgroup_bytes(f, plan, n); });
    plan.resident = plan.resident && plan.family == AttentionFamily::kTensor;
    return;
  }
  replace(plan.family, plan.stages, plan.shared_bytes,
          [&](int64_t n) { return warpgroup_backward_bytes(f, plan, false, n); });
  replace(plan.key_family, plan.key_stages, plan.key_shared_bytes,
          [&](int64_t n) { return warpgroup_backward_bytes(f, plan, true, n); });
}

// A plan for the tensor kernels, without the numbers of parts; for the plain kernels where those cannot run.
inline AttentionPlan tensor_plan(const AttentionFacts& f, bool backward) {
  if (f.dtype == Dtype::kFloat64 || f.channels * size_of(f.dtype) > kTensorHead) return {};
  // The maximum of a row is found before the scale is applied: it must not be negative.
  if ((f.low_rank && f.rank > kTensorRank) || !f.positive_scale) return {};
  AttentionPlan plan;
  plan.family = plan.key_family = AttentionFamily::kTensor;
  plan.channels = round_to(f.channels, 32);
  plan.kernel_channels = round_to(plan.channels, 64);
  const int64_t memory = f.device.block_memory,
                limit = is_wide(f, plan) || memory < kBlockMemory ? memory : kBlockMemory;
  // Strips of warpgroups also have what is left and right of the window.
  const int64_t edges = has_warpgroups(f, plan) ? 2 : 0;
  if (backward) {
    plan.strip_pitch = f.relative ? strip_pitch_of(f.window + edges, kGradOthers) : 0;
    plan.grad_pitch = f.relative ? grad_columns(f.window, kGradOthers) | 1 : 0;
    plan.shared_bytes = backward_bytes(f, plan, false);
    plan.key_shared_bytes = backward_bytes(f, plan, true);
  } else {
    plan.strip_pitch = f.relative ? strip_pitch_of(f.window + edges, kForwardKeys) : 0;
    const int64_t all = (f.keys + kForwardKeys - 1) / kForwardKeys;
    plan.resident = !f.packed && f.keys <= kResidentKeys && f.keys > 0 && forward_bytes(f, plan, all) <= limit;
    plan.shared_bytes = forward_bytes(f, plan, plan.resident ? all : 2);
  }
  return plan.shared_bytes <= limit && plan.key_shared_bytes <= limit ? plan : AttentionPlan{};
}

// sums over positions

constexpr int kTapRows = 64;  // queries of a tile of the kernel for the depthwise term's tables

// Bytes that all partial sums of one table may take, unless a single one per head takes more.
constexpr int64_t kPartBytes = 64 << 20;

// Parts of the `tiles` of each of `units` heads: blocks that make a partial sum of `numbers` numbers each. Enough to
// fill a device, as far as the sums stay below kPartBytes; none without a tile.
inline int64_t parts_of(int64_t units, int64_t tiles, int64_t numbers, int64_t multiprocessors) {
  units = units < 1 ? 1 : units;
  const int64_t wanted = (8 * multiprocessors + units - 1) / units;
  const int64_t affordable = numbers == 0 ? wanted : kPartBytes / (4 * numbers * units);
  const int64_t fewest = wanted < affordable ? wanted : affordable, parts = tiles < fewest ? tiles : fewest;
  return parts < 1 ? 1 : parts;
}

inline AttentionPlan plan_attention(const AttentionFacts& f, bool backward) {
  AttentionPlan plan = tensor_plan(f, backward);
  if (plan.family == AttentionFamily::kTensor) use_warpgroups(plan, f, backward);
  const bool plain = plan.family == AttentionFamily::kPlain;
  const int64_t units = f.batch * f.heads;
  const auto tiles = [&](int64_t positions, int64_t size) {
    return attention_tiles(positions, f.sequences, f.packed, size);
  };
  if (!backward) {
    if (plain) return plan;
    // A block that holds all keys serves several tiles of queries.
    plan.query_parts = tiles(f.queries, forward_rows(plan.channels, f.dtype));
    if (plan.family == AttentionFamily::kWarpgroup) {
      const int64_t all = tiles(f.queries, kWarpgroupRows) * units;
      plan.query_parts = all < f.device.multiprocessors ? all : f.device.multiprocessors;
    }
    if (plan.resident) plan.query_parts = parts_of(units, plan.query_parts, 0, f.device.multiprocessors);
    return plan;
  }
  // Each warp of the kernels on tensor cores makes partial sums of its own.
  const auto warps_of = [](AttentionFamily family) {
    return family == AttentionFamily::kPlain ? 1 : family == AttentionFamily::kTensor ? kTensorWarps : kWarpgroupWarps;
  };
  const auto rows_of = [](AttentionFamily family, int plain_rows) {
    return family == AttentionFamily::kPlain    ? plain_rows
           : family == AttentionFamily::kTensor ? kGradRows
                                                : kWarpgroupRows;
  };
  const int64_t columns = f.relative ? f.window : 0;
  const int warps = warps_of(plan.family), key_warps = warps_of(plan.key_family);
  plan.query_parts = warps * parts_of(units, tiles(f.queries, rows_of(plan.family, kPlainTileRows)),
                                      warps * columns * (f.query_rel ? f.rank : 1), f.device.multiprocessors);
  plan.key_parts = key_warps * parts_of(f.batch * f.groups, tiles(f.keys, rows_of(plan.key_family, kPlainTileKeys)),
                                        f.key_rel ? key_warps * columns * f.channels * (f.heads / f.groups) : 0,
                                        f.device.multiprocessors);
  plan.tap_parts = parts_of(units, tiles(f.queries, kTapRows), (f.window + 1) * f.channels, f.device.multiprocessors);
  return plan;
}

}  // namespace ck::cuda
