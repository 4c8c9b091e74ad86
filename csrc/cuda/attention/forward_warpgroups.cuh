// The forward pass of attention on GPUs of compute capability 9.0: 16-bit types, up to 128 channels, rows that
// tensor_load can read.
//
// As many blocks as the GPU has processors share the tiles of 128 queries of all heads. One warp of a block has rows of
// q, and of 128 keys and their values at a time, copied to shared memory, as far ahead as there is room. Two
// warpgroups have 64 of the queries each. For each tile of keys, a warpgroup
//   waits for the products q k^T of this tile, and of the weights of the last tile with its values,
//   makes scores (far_tile_scores, near_tile_scores) and weights (update_softmax) of the former, while the products of
//   the other warpgroup run, and scales the results if a maximum has grown,
//   starts the products of these weights with their values and q k^T of the next tile, when it is its turn.
// What relative terms add is found once for a tile of queries where the window is short. Tiles of keys on one side of
// it, which all queries see, take the path of attention without relative terms.
#pragma once

#include "csrc/cuda/attention/softmax.cuh"
#include "csrc/cuda/attention/taps.cuh"
#include "csrc/cuda/attention/warpgroup_ring.cuh"
#include "csrc/cuda/attention/warpgroup_tiles.cuh"

namespace ck::cuda {

// The tiles of queries of a block: one in each round, the longest ones first where they differ in length.
struct WarpgroupSchedule {
  int tiles, units;  // a unit is a head of a batch row
  bool longest_first;

  CK_DEVICE int rounds() const { return (tiles * units + gridDim.x - 1) / gridDim.x; }
  // Returns false if this block has none, in the last round.
  CK_DEVICE bool find(int round, int& tile, int& unit) const {
    const int n = round * gridDim.x + (round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
    if (n >= tiles * units) return false;
    tile = longest_first ? tiles - 1 - n / units : n % tiles;
    unit = longest_first ? n % units : n / tiles;
    return true;
  }
};

// Writes lse, and the results of a warp's 16 queries: out over total, plus the depthwise term. own: the first row of
// the tile that is the warp's.
template <class T, int D>
CK_DEVICE void store_warp_results(const AttentionForward& p, const TensorTables& t, const AttentionTile& tile, int b,
                                  int h, int own, const float (&out)[D / 8][4], const float (&top)[2],
                                  const float (&total)[2], float* stage, bool spoiled, int lane) {
  const int channels = static_cast<int>(p.channels), count = min(tile.count - own, 16), i0 = tile.first + own;
  float sum[2], factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] = row_sum(total[half]);
    factor[half] = sum[half] != 0.0f ? static_cast<float>(p.keep_scale) * fast_reciprocal(sum[half]) : 0.0f;
  }
  // Four lanes have the same two rows.
  if (const int half = lane % 4, r = lane / 4 + 8 * half; half < 2 && r < count) {
    const float s = half == 0 ? sum[0] : sum[1], highest = half == 0 ? top[0] : top[1];
    at<float>(p.lse, b, h, i0 + r) = s != 0.0f ? highest * kLn2 + logf(s) : -infinity<float>();
  }
  if (t.vectors && t.taps == nullptr && !spoiled) {
    store_rows<T, D>(at<T>(p.out, b, i0, h), p.out.time, count, channels, out, factor, reinterpret_cast<char*>(stage),
                     lane);
    return;
  }
  each_row<D>(out, factor, stage, lane, [&](int r, int d, float (&value)[8]) {
    const int i = i0 + r;
    if (r >= count || d >= channels) return;
    if (spoiled && at<float>(p.lse, b, h, i) != -infinity<float>())
      add_spoiled<T>(value, p.v, b, h / static_cast<int>(p.sharing()), visible_keys(p, tile, i), d, channels - d,
                     t.vectors, [&](int j) { return real_key(p, b, j); });
    if (t.taps != nullptr) add_taps<T>(value, p, t, tile, b, h, i, d);
    store_channels(at<T>(p.out, b, i, h) + d * p.out.channel, p.out.channel, channels - d, t.vectors, value);
  });
}

template <class T, int D>
CK_GLOBAL(kWarpgroupThreads, 1)
void attention_forward_warpgroups(const CK_PARAM AttentionForward p, const CK_PARAM TensorTables t,
                                  const CK_PARAM TensorMap q_map, const CK_PARAM TensorMap k_map,
                                  const CK_PARAM TensorMap v_map, int tiles, int stages) {
  if constexpr (!kWarpgroups) {
    stop_kernel();
  } else {
    constexpr int kRows = kWarpgroupRows, kKeys = kWarpgroupKeys;
    constexpr int kQueryBytes = 2 * kRows * D, kKeyBytes = 2 * kKeys * D, kPanel = 128 * kKeys;
    // The same for all lanes, which the compiler should know.
    const int lane = threadIdx.x % 32, warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0);
    const bool low_rank = p.rel_query.data != nullptr;
    const int rel_pitch = low_rank ? static_cast<int>(t.rank_pitch) + 8 : 0;

    auto* const signals = reinterpret_cast<RingSignals*>(shared_memory_1024());
    char* const q_rows = shared_memory_1024() + kSignalBytes;
    char* const ring = q_rows + kQueryBytes;
    float* const strips = reinterpret_cast<float*>(ring + stages * 2 * kKeyBytes);
    const int strip_floats = max(kStageFloats, 16 * static_cast<int>(t.strip_pitch));
    char* const r_rows = reinterpret_cast<char*>(strips + kWarpgroupWarps * strip_floats);
    const auto keys_at = [&](int stage) { return ring + stage * 2 * kKeyBytes; };
    const auto values_at = [&](int stage) { return keys_at(stage) + kKeyBytes; };

    // Keys and values have stages of their own.
    begin_signals(*signals, 2 * stages, 1);
    const auto key_full = [&](int stage) { return &signals->full[2 * stage]; };
    const auto key_free = [&](int stage) { return &signals->free[2 * stage]; };
    const auto value_full = [&](int stage) { return &signals->full[2 * stage + 1]; };
    const auto value_free = [&](int stage) { return &signals->free[2 * stage + 1]; };

    const WarpgroupSchedule schedule{tiles, static_cast<int>(p.batch * p.heads), p.causal};
    int number = 0, unit = 0;
    unsigned loads = 0;  // loads: of tiles of queries, so far

    if (warp < 4) {
      give_registers<kCopyRegisters>();
      if (threadIdx.x != 0) return;
      prefetch_tensor_map(q_map);
      prefetch_tensor_map(k_map);
      prefetch_tensor_map(v_map);
      RingPlace place{stages};
      for (int round = 0; round < schedule.rounds(); ++round) {
        if (!schedule.find(round, number, unit)) break;
        const AttentionTile tile(p, number, kRows, false);
        int first = 0;
        const int count = tiles_of_keys<kKeys>(p, tile, first);
        if (count == 0) continue;
        const int b = unit / static_cast<int>(p.heads), h = unit % static_cast<int>(p.heads);
        const int g = h / static_cast<int>(p.sharing());
        const auto load = [&](char* to, const TensorMap& map, int row, int head, uint64_t* full, int bytes) {
          mbarrier_arrive_expect(full, bytes);
          load_panels<D>(to, kPanel, map, row, head, b, full);
        };
        mbarrier_wait(&signals->own_free, (loads++ & 1) ^ 1);
        load(q_rows, q_map, tile.first, h, &signals->own_full, kQueryBytes);
        for (int n = 0; n < count; ++n) {
          mbarrier_wait(key_free(place.stage), place.parity() ^ 1);
          load(keys_at(place.stage), k_map, first + n * kKeys, g, key_full(place.stage), kKeyBytes);
          mbarrier_wait(value_free(place.stage), place.parity() ^ 1);
          load(values_at(place.stage), v_map, first + n * kKeys, g, value_full(place.stage), kKeyBytes);
          place.advance();
        }
      }
      return;
    }

    take_registers<kProductRegisters>();
    const int group = warp / 4 - 1, own = group * 64 + warp % 4 * 16;  // own: the first row of the warp
    const WarpgroupTurn turn(group);
    float* const scratch = strips + (group * 4 + warp % 4) * strip_floats;
    const bool whole = p.has_columns() && t.strip_pitch >= p.window() + 2;

    RingPlace place{stages};
    for (int round = 0; round < schedule.rounds(); ++round) {
      if (!schedule.find(round, number, unit)) break;
      const AttentionTile tile(p, number, kRows, false);
      if (tile.count <= 0) continue;
      const int b = unit / static_cast<int>(p.heads), h = unit % static_cast<int>(p.heads);
      const int i0 = tile.first + own;
      int first = 0;
      const int count = tiles_of_keys<kKeys>(p, tile, first);
      float out[D / 8][4], top[2] = {-infinity<float>(), -infinity<float>()}, total[2] = {};
      set_zero(out);
      if (count > 0) {
        const float* const edges = t.key_edges == nullptr ? nullptr : t.key_edges + int64_t{unit} * 2 * p.keys;
        const Relative<T> rel(p, t, h, lane, edges, scratch + 1);
        if (low_rank) {
          copy_tile<64>(reinterpret_cast<T*>(r_rows) + group * 64 * rel_pitch, rel_pitch, p.rel_query, b, h,
                        tile.first + group * 64, Range{tile.first, tile.first + tile.count}, static_cast<int>(p.rank),
                        static_cast<int>(t.rank_pitch), t.rank_vectors, threadIdx.x % 128);
          cp_async_commit();
        }
        mbarrier_wait(&signals->own_full, loads++ & 1);
        const TileRows rel_rows = low_rank ? TileRows{r_rows + own * 2 * rel_pitch, 0, 2 * rel_pitch}
                                           : TileRows{q_rows + own * 128, kPanel, 0};
        float left[2], right[2];

        float s[kKeys / 8][4];
        uint32_t weights[kKeys / 16][4];
        const auto multiply_keys = [&] {
          mbarrier_wait(key_full(place.stage), place.parity());
          const Operand q = operand(q_rows + group * 64 * 128), keys = operand(keys_at(place.stage));
          wgmma_fence();
          start_pairs<T, D, kKeys>(s, q, kPanel, keys, kPanel);
          wgmma_commit();
        };
        const auto multiply_values = [&] {
          const Operand values = operand(values_at(place.stage), kPanel);
          keep_registers(weights);
          keep_registers(out);
          wgmma_fence();
          start_rows<T, D>(out, weights, values);
          wgmma_commit();
        };
        unsigned asked[kKeys / 32], real[kKeys / 32];  // of the mask, asked before a wait
        const FarTiles<Side::kQueries, kKeys, 16> far(p, tile, i0);
        const SeenTiles<kKeys> seen(p, tile);
        const auto narrow_weights = [&](int j0) {
          if (p.seed != nullptr) {
#pragma unroll
            for (int sub = 0; sub < kKeys / 32; ++sub) {
              const PairTile<Side::kQueries, 32> pairs(p, tile, i0, j0 + 32 * sub);
              const uint32_t kept = draw_fragments(p, static_cast<uint64_t>(*p.seed), b, h, pairs, lane);
              for (int e = 0; e < 16; ++e)
                if ((kept >> e & 1u) == 0) s[4 * sub + e / 4][e % 4] = 0.0f;
            }
          }
          round_sums<T>(weights, s);
        };
        // Values that some query does not see must be finite, since its weights of them are 0. All warps clear the
        // others, which are added at the end.
        const auto clear_hidden = [&] {
          if (clear_rows<T, D, kKeys / 2>(values_at(place.stage), kPanel, group * kKeys / 2)) signals->spoil(loads);
          fence_async_proxy();
          turn.meet();
        };

        turn.begin();
        keep_registers(out);
        multiply_keys();
        turn.end();
        ask_masks(asked, p, b, first, lane);
        if (low_rank) {
          cp_async_wait<0>();
          turn.meet_own();
        }
        if (whole)
          fill_whole_strip<3>(left, right, rel, rel_rows);
        else
          rel.query_edges(left, right, rel_rows);
#pragma unroll 1
        for (int n = 0;;) {
          const int j0 = first + n * kKeys;
          wgmma_wait<0>();
          keep_registers(s);
          keep_registers(out);
          if (n > 0) release(value_free(place.before()));
          if (p.key_rel.data == nullptr) release(key_free(place.stage));
          if (!p.qk) leave_out(s);
          real_keys(real, p, asked);
          uint32_t seen_pairs[kKeys / 32];
          const bool all_real = all_of(real);
          const ScoreTerms terms =
              far.has(j0, all_real)
                  ? far_tile_scores<T, kKeys>(s, rel, far.is_left(j0), j0, left, right)
                  : near_tile_scores<T, kKeys, 3>(s, seen_pairs, rel, tile, far, i0, j0, real, left, right, rel_rows,
                                                  TileRows{keys_at(place.stage), kPanel, 0}, whole);
          if (p.key_rel.data != nullptr) release(key_free(place.stage));
          if (n == count - 1) release(&signals->own_free);
          float shrink[2];
          const bool grows = update_softmax(s, terms, top, total, shrink);
          // After the first tiles it is rare that one of 16 rows finds a larger score.
          if (n > 0 && __any_sync(kAllLanes, grows)) {
#pragma unroll
            for (int c = 0; c < D / 8; ++c)
              for (int e = 0; e < 4; ++e) out[c][e] *= shrink[e / 2];
          }
          narrow_weights(j0);
          mbarrier_wait(value_full(place.stage), place.parity());
          if (!seen.has(j0, all_real)) clear_hidden();
          turn.begin();
          multiply_values();
          place.advance();
          if (++n == count) break;
          multiply_keys();
          turn.end();
          ask_masks(asked, p, b, first + n * kKeys, lane);
        }
        turn.end();
        wgmma_wait<0>();
        keep_registers(out);
        release(value_free(place.before()));
      }
      const bool spoiled = count > 0 && signals->is_spoiled(loads);
      store_warp_results<T, D>(p, t, tile, b, h, own, out, top, total, scratch, spoiled, lane);
    }
    turn.finish();
  }
}

}  // namespace ck::cuda
