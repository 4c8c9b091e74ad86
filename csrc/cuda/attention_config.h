// Which kernels run an attention, and how the work is cut: plain data, chosen by pure functions of the problem, the
// same on every device and testable on any host.
#pragma once

#include "../common/attention.h"

namespace ck::cuda {

enum class AttentionFamily : int8_t {
  kPlain,   // any problem
  kTensor,  // 16-bit types on tensor cores
};

inline const char* name_of(AttentionFamily family) { return family == AttentionFamily::kPlain ? "plain" : "tensor"; }

// What the choice depends on.
struct AttentionFacts {
  int64_t batch = 1, queries = 1, keys = 1, heads = 1, groups = 1, channels = 64, rank = 64, window = 1, sequences = 1;
  Dtype dtype = Dtype::kBFloat16;
  bool packed = false, query_rel = false, key_rel = false, bias = false, dropout = false;
  bool channel_vectors = true;  // every tensor like q can be read 16 bytes at a time along its channels
  int64_t multiprocessors = 132;
};

struct AttentionPlan {
  AttentionFamily family = AttentionFamily::kPlain;
  int64_t channels = 0;                    // of the tensor kernels, padded
  int64_t query_parts = 1, key_parts = 1;  // pieces of a head's tiles; their sums for tables are added at the end
  int64_t tap_parts = 1;
};

// Tiles of `size` positions, where each of the sequences may begin a new one.
inline int64_t attention_tiles(int64_t positions, int64_t sequences, bool packed, int64_t size) {
  return packed ? positions / size + sequences : (positions + size - 1) / size;
}

// ---- plain: tiles of 16 queries and 32 keys

constexpr int kPlainTileRows = 16, kPlainTileKeys = 32;
constexpr int kPlainTileWarps = 4, kPlainTileThreads = 32 * kPlainTileWarps;
constexpr int kPlainPitch = 33;   // from row to row of 32 channels, or keys, in shared memory
constexpr int kPlainSlice = 128;  // channels of the results that a block makes

inline int64_t plain_slices(int64_t channels) { return (channels + kPlainSlice - 1) / kPlainSlice; }

// Numbers of the accumulation type in shared memory.
constexpr int64_t kPlainPairs = (kPlainTileRows + kPlainTileKeys) * (kPlainPitch + 2);
constexpr int64_t kPlainWeights = kPlainTileRows * kPlainPitch;
constexpr int64_t kPlainForwardRoom = kPlainPairs + kPlainWeights + kPlainTileRows * kPlainSlice;
constexpr int64_t kPlainQueryRoom = kPlainPairs + kPlainWeights + 2 * kPlainTileRows * kPlainSlice + 2 * kPlainTileRows;
constexpr int64_t kPlainKeyRoom =
    kPlainPairs + 2 * kPlainWeights + 2 * kPlainTileThreads + 2 * kPlainTileKeys * kPlainSlice;

// ---- sums over positions

constexpr int kTapRows = 64;  // queries of a tile of the kernel for the depthwise term's tables

// Pieces of the `tiles` of each of `units` heads, as blocks that make one piece of a table's sums each: few enough for
// the sums to stay small, and enough to fill a device. No piece without a tile.
inline int64_t parts_of(int64_t units, int64_t tiles, int64_t multiprocessors) {
  const int64_t wanted = (8 * multiprocessors + units - 1) / (units < 1 ? 1 : units);
  const int64_t most = tiles < 1 ? 1 : tiles;
  return wanted < most ? wanted : most;
}

inline AttentionPlan plan_attention(const AttentionFacts& f, bool backward) {
  AttentionPlan plan;
  const int64_t units = f.batch * f.heads;
  if (backward) {
    const auto parts = [&](int64_t heads, int64_t positions, int64_t size) {
      return parts_of(heads, attention_tiles(positions, f.sequences, f.packed, size), f.multiprocessors);
    };
    plan.query_parts = parts(units, f.queries, kPlainTileRows);
    plan.key_parts = parts(f.batch * f.groups, f.keys, kPlainTileKeys);
    plan.tap_parts = parts(units, f.queries, kTapRows);
  }
  return plan;
}

}  // namespace ck::cuda
