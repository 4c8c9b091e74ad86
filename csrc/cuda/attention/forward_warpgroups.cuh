// The forward pass of attention on GPUs of compute capability 9.0: 16-bit types, up to 128 channels, rows that
// tensor_load can read.
//
// As many blocks as the GPU has processors share the tiles of 128 queries of all heads. One warp of a block has rows of
// q, and of 128 keys and their values at a time, copied to shared memory, as far ahead as there is room. Two
// warpgroups have 64 of the queries each. For each tile of keys, a warpgroup
//   starts the products q k^T of this tile, and of the weights of the last tile with its values,
//   lets the other warpgroup start its own, which then run while this one
//   waits for q k^T and makes scores (tile_scores) and weights of it (update_softmax), as forward.cuh does,
//   waits for the results, and scales them if a maximum has grown.
// What relative terms add is found once for a tile of queries where the window is short. Tiles of keys on one side of
// it, which all queries see, take the path of attention without relative terms.
#pragma once

#include "csrc/cuda/attention/softmax.cuh"
#include "csrc/cuda/attention/warpgroup_tiles.cuh"

namespace ck::cuda {

// What the warps of a block tell each other.
struct WarpgroupSignals {
  uint64_t q_full, q_free, k_full[kMostStages], k_free[kMostStages], v_full[kMostStages], v_free[kMostStages];
  int spoiled[2];  // the last of the even, or odd, tiles of this block whose values were not all finite, plus 1
};

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

// Scores of 16 queries, from i0 on, and the 128 keys from j0 on: products s become scores, unless all pairs are on one
// side. real: the keys that the mask leaves. `whole`: the strip has all columns and what the queries add there.
template <class T>
CK_DEVICE ScoreTerms tile_scores(float (&s)[kWarpgroupKeys / 8][4], const Relative<T>& rel, const AttentionTile& tile,
                                 const FarTiles<Side::kQueries, kWarpgroupKeys, 16>& far, int i0, int j0,
                                 const unsigned (&real)[kWarpgroupKeys / 32], const float (&left)[2],
                                 const float (&right)[2], const TileRows& query_rows, const TileRows& key_rows,
                                 bool whole) {
  const Attention& p = rel.p;
  const float factor = rel.t.score_factor;
  if (far.has(j0, (real[0] & real[1] & real[2] & real[3]) == ~0u)) {
    const int side = PairTile<Side::kQueries, kWarpgroupKeys>(p, tile, i0, j0).is_left() ? 0 : 1;
    ScoreTerms terms = far_scores(rel, side, left, right);
    if (rel.edges != nullptr) {
      const float* const added = rel.edges + (side == 0 ? 0 : p.keys) + j0 + rel.lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kWarpgroupKeys / 8; ++n)
        for (int e = 0; e < 4; ++e) s[n][e] = s[n][e] * factor + added[8 * n + e % 2];
      terms.factor = 1;
    }
    return terms;
  }
#pragma unroll
  for (int sub = 0; sub < kWarpgroupKeys / 32; ++sub) {
    float (&part)[4][4] = reinterpret_cast<float (&)[4][4]>(s[4 * sub]);
    const PairTile<Side::kQueries, 32> pairs(p, tile, i0, j0 + 32 * sub);
    if (rel.edges == nullptr && pairs.far(real[sub])) {
      const bool is_left = pairs.is_left();
#pragma unroll
      for (int n = 0; n < 4; ++n)
        for (int e = 0; e < 4; ++e) part[n][e] = part[n][e] * factor + (is_left ? left[e / 2] : right[e / 2]);
      continue;
    }
    int first = 0;
    if (p.has_columns()) {
      const Range columns = pairs.columns();
      if (!whole) {
        first = columns.first;
        rel.template fill_strip<Side::kQueries>(columns, query_rows);
      }
      rel.add_others(pairs, columns, first, TileRows{key_rows.rows + 32 * sub * 128, key_rows.panel, 0});
    }
    score_pairs(part, rel, pairs, real[sub], left, right, first);
  }
  return {1, {}, -1, 0};
}

// Writes lse, and the results of a warp's 16 queries: out over total, plus the depthwise term. 32 channels at a time go
// through `stage`, [16][32] floats, to be written in whole vectors. own: the first row of the tile that is the warp's.
template <class T, int D>
CK_DEVICE void store_warp_results(const AttentionForward& p, const TensorTables& t, const AttentionTile& tile, int b,
                                  int h, int own, const float (&out)[D / 8][4], const float (&top)[2],
                                  const float (&total)[2], float* stage, bool spoiled, int lane) {
  const int channels = static_cast<int>(p.channels), g = h / static_cast<int>(p.sharing());
  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = row_sum(total[half]);
    const bool sees = sum != 0.0f;
    factor[half] = sees ? static_cast<float>(p.keep_scale) / sum : 0.0f;
    const int r = own + lane / 4 + 8 * half;
    if (lane % 4 == 0 && r < tile.count)
      at<float>(p.lse, b, h, tile.first + r) = sees ? top[half] * kLn2 + logf(sum) : -infinity<float>();
  }
  // Where 4 channels of a row stand: in other banks than those of the rows that are written, or read, at once.
  const auto place = [&](int row, int four) { return stage + row * 32 + (four ^ (row % 4 * 2) ^ (row & 1)) * 4; };
#pragma unroll
  for (int c0 = 0; c0 < D; c0 += 32) {
    __syncwarp();
#pragma unroll
    for (int c = 0; c < 4; ++c)
      for (int half = 0; half < 2; ++half) {
        const float (&value)[4] = out[c0 / 8 + c];
        const float f = factor[half];
        *reinterpret_cast<float2*>(place(lane / 4 + 8 * half, 2 * c + lane % 4 / 2) + lane % 2 * 2) =
            make_float2(f == 0.0f ? 0.0f : value[2 * half] * f, f == 0.0f ? 0.0f : value[2 * half + 1] * f);
      }
    __syncwarp();
#pragma unroll 1
    for (int v = lane; v < 16 * 4; v += 32) {
      const int r = v / 4, d = c0 + v % 4 * 8, i = tile.first + own + r;
      if (own + r >= tile.count || d >= channels) continue;
      float value[8];
      for (int n = 0; n < 2; ++n) {
        const float4 four = *reinterpret_cast<const float4*>(place(r, v % 4 * 2 + n));
        value[4 * n] = four.x, value[4 * n + 1] = four.y, value[4 * n + 2] = four.z, value[4 * n + 3] = four.w;
      }
      if (spoiled && at<float>(p.lse, b, h, i) != -infinity<float>())
        add_spoiled<T>(value, p.v, b, g, visible_keys(p, tile, i), d, channels - d, t.vectors,
                       [&](int j) { return real_key(p, b, j); });
      if (t.taps != nullptr) add_taps<T>(value, p, t, tile, b, h, i, d);
      store_channels(at<T>(p.out, b, i, h) + d * p.out.channel, p.out.channel, channels - d, t.vectors, value);
    }
  }
}

template <class T, int D>
CK_GLOBAL(kWarpgroupThreads, 1)
void attention_forward_warpgroups(const CK_PARAM AttentionForward p, const CK_PARAM TensorTables t,
                                  const CK_PARAM TensorMap q_map, const CK_PARAM TensorMap k_map,
                                  const CK_PARAM TensorMap v_map, int tiles, int stages) {
  if constexpr (!kWarpgroups) {
    stop_kernel();
  } else {
    constexpr int kRows = kWarpgroupRows, kKeys = kWarpgroupKeys, kPanels = D / 64;
    constexpr int kQueryBytes = 2 * kRows * D, kKeyBytes = 2 * kKeys * D, kPanel = 128 * kKeys;
    // The same for all lanes, which the compiler should know.
    const int lane = threadIdx.x % 32, warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0);
    const bool low_rank = p.rel_query.data != nullptr;
    const int rel_pitch = low_rank ? static_cast<int>(t.rank_pitch) + 8 : 0;

    auto* const signals = reinterpret_cast<WarpgroupSignals*>(shared_memory_1024());
    char* const q_rows = shared_memory_1024() + kSignalBytes;
    char* const ring = q_rows + kQueryBytes;
    float* const strips = reinterpret_cast<float*>(ring + stages * 2 * kKeyBytes);
    const int strip_floats = max(kStageFloats, 16 * static_cast<int>(t.strip_pitch));
    char* const r_rows = reinterpret_cast<char*>(strips + kWarpgroupWarps * strip_floats);
    const auto keys_at = [&](int stage) { return ring + stage * 2 * kKeyBytes; };
    const auto values_at = [&](int stage) { return keys_at(stage) + kKeyBytes; };

    if (threadIdx.x == 0) {
      mbarrier_init(&signals->q_full, 1);
      mbarrier_init(&signals->q_free, kWarpgroupWarps);
      for (int n = 0; n < stages; ++n) {
        mbarrier_init(&signals->k_full[n], 1);
        mbarrier_init(&signals->k_free[n], kWarpgroupWarps);
        mbarrier_init(&signals->v_full[n], 1);
        mbarrier_init(&signals->v_free[n], kWarpgroupWarps);
      }
      signals->spoiled[0] = signals->spoiled[1] = 0;
      fence_mbarrier_init();
    }
    __syncthreads();

    const WarpgroupSchedule schedule{tiles, static_cast<int>(p.batch * p.heads), p.causal};
    // The tiles of keys that a tile of queries meets, from `first` on.
    const auto met = [&](const AttentionTile& tile, int& first) {
      if (tile.count <= 0) return 0;
      const Range keys = visible_keys(p, tile, tile.first, tile.first + tile.count);
      first = keys.first / 8 * 8;
      return keys.first < keys.end ? static_cast<int>(ceil_div(keys.end - first, kKeys)) : 0;
    };
    int number = 0, unit = 0, loads = 0;  // loads: of tiles of queries, so far

    if (warp < 4) {
      give_registers<kCopyRegisters>();
      if (threadIdx.x != 0) return;
      prefetch_tensor_map(q_map);
      prefetch_tensor_map(k_map);
      prefetch_tensor_map(v_map);
      int stage = 0;
      unsigned round_trip = 0;  // of the ring
      for (int round = 0; round < schedule.rounds(); ++round) {
        if (!schedule.find(round, number, unit)) break;
        const AttentionTile tile(p, number, kRows, false);
        int first = 0;
        const int count = met(tile, first);
        if (count == 0) continue;
        const int b = unit / static_cast<int>(p.heads), h = unit % static_cast<int>(p.heads);
        const int g = h / static_cast<int>(p.sharing());
        const auto load = [&](char* to, const TensorMap& map, int row, int head, uint64_t* full, int bytes) {
          mbarrier_arrive_expect(full, bytes);
          for (int c = 0; c < kPanels; ++c) tensor_load(to + c * kPanel, map, 64 * c, row, head, b, full);
        };
        mbarrier_wait(&signals->q_free, (loads & 1) ^ 1);
        load(q_rows, q_map, tile.first, h, &signals->q_full, kQueryBytes);
        ++loads;
        for (int n = 0; n < count; ++n) {
          mbarrier_wait(&signals->k_free[stage], (round_trip & 1) ^ 1);
          load(keys_at(stage), k_map, first + n * kKeys, g, &signals->k_full[stage], kKeyBytes);
          mbarrier_wait(&signals->v_free[stage], (round_trip & 1) ^ 1);
          load(values_at(stage), v_map, first + n * kKeys, g, &signals->v_full[stage], kKeyBytes);
          if (++stage == stages) stage = 0, ++round_trip;
        }
      }
      return;
    }

    take_registers<kProductRegisters>();
    const int group = warp / 4 - 1, own = group * 64 + warp % 4 * 16;  // own: the first row of the warp
    const int own_turn = 1 + group, other_turn = 2 - group, together = 3, in_group = 4 + group;
    float* const strip = strips + (group * 4 + warp % 4) * strip_floats;
    const bool whole = p.has_columns() && t.strip_pitch > p.window();
    if (group == 1) barrier_arrive(other_turn, kTurnThreads);  // the first warpgroup begins

    int stage = 0;
    unsigned round_trip = 0;
    for (int round = 0; round < schedule.rounds(); ++round) {
      if (!schedule.find(round, number, unit)) break;
      const AttentionTile tile(p, number, kRows, false);
      if (tile.count <= 0) continue;
      const int b = unit / static_cast<int>(p.heads), h = unit % static_cast<int>(p.heads);
      const int i0 = tile.first + own;
      int first = 0;
      const int count = met(tile, first);
      float out[D / 8][4], top[2] = {-infinity<float>(), -infinity<float>()}, total[2] = {};
      set_zero(out);
      bool spoiled = false;
      if (count > 0) {
        const float* const edges = t.key_edges == nullptr ? nullptr : t.key_edges + int64_t{unit} * 2 * p.keys;
        const Relative<T> rel(p, t, h, lane, edges, strip);
        if (low_rank) {
          barrier_sync(in_group, 128);  // the rows of the last tile have been read
          copy_tile<64>(reinterpret_cast<T*>(r_rows) + group * 64 * rel_pitch, rel_pitch, p.rel_query, b, h,
                        tile.first + group * 64, Range{tile.first, tile.first + tile.count}, static_cast<int>(p.rank),
                        static_cast<int>(t.rank_pitch), t.rank_vectors, threadIdx.x % 128);
          cp_async_commit();
        }
        mbarrier_wait(&signals->q_full, loads & 1);
        ++loads;
        const TileRows rel_rows = low_rank ? TileRows{r_rows + own * 2 * rel_pitch, 0, 2 * rel_pitch}
                                           : TileRows{q_rows + own * 128, kPanel, 0};
        float left[2], right[2];

        float s[kKeys / 8][4];
        uint32_t weights[kKeys / 16][4];
        const auto multiply_keys = [&] {
          mbarrier_wait(&signals->k_full[stage], round_trip & 1);
          const Operand q = operand(q_rows + group * 64 * 128), keys = operand(keys_at(stage));
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < D / 16; ++k) {
            const int at = k / 4 * kPanel + k % 4 * 32;
            wgmma<T, kKeys>(s, q.further(at), keys.further(at), k > 0);
          }
          wgmma_commit();
        };
        const auto multiply_values = [&] {
          const Operand values = operand(values_at(stage), kPanel);
          keep_registers(weights);
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < kKeys / 16; ++k)
            wgmma<T, D, Major::kOther>(out, weights[k], values.further(k * 2048), true);
          wgmma_commit();
        };
        // By the last lane to do so.
        const auto free = [&](uint64_t* signal) {
          __syncwarp();
          if (lane == 0) mbarrier_arrive(signal);
        };
        // The keys of the tile that the mask leaves, asked for before a wait.
        unsigned asked[kKeys / 32], real[kKeys / 32];
        const auto ask = [&](int j0) {
#pragma unroll
          for (int n = 0; n < kKeys / 32; ++n) asked[n] = ask_mask(p, b, j0 + 32 * n, lane);
        };
        const FarTiles<Side::kQueries, kKeys, 16> far(p, tile, i0);
        const SeenTiles seen(p, tile);
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
#pragma unroll
          for (int k = 0; k < kKeys / 16; ++k)
            for (int e = 0; e < 4; ++e)
              weights[k][e] = narrow_pair<T>(s[2 * k + e / 2][e % 2 * 2], s[2 * k + e / 2][e % 2 * 2 + 1]);
        };
        // Values that some query does not see must be finite, since its weights of them are 0. All warps clear the
        // others, which are added at the end.
        const auto clear_hidden = [&] {
          if (clear_values<T, D>(values_at(stage), kPanel, group)) signals->spoiled[round % 2] = round + 1;
          fence_async_proxy();
          barrier_sync(together, kTurnThreads);
          spoiled = spoiled || signals->spoiled[round % 2] == round + 1;
        };

        barrier_sync(own_turn, kTurnThreads);
        keep_registers(out);
        multiply_keys();
        barrier_arrive(other_turn, kTurnThreads);
        ask(first);
        if (low_rank) {
          cp_async_wait<0>();
          barrier_sync(in_group, 128);
        }
        rel.query_edges(left, right, rel_rows);
        if (whole) rel.template fill_strip<Side::kQueries>(Range{0, rel.W}, rel_rows);
#pragma unroll 1
        for (int n = 0;;) {
          const int j0 = first + n * kKeys;
          wgmma_wait<0>();
          keep_registers(s);
          keep_registers(out);
          if (n > 0) free(&signals->v_free[stage == 0 ? stages - 1 : stage - 1]);
          if (p.key_rel.data == nullptr) free(&signals->k_free[stage]);
          if (!p.qk) set_zero(s);
#pragma unroll
          for (int x = 0; x < kKeys / 32; ++x) real[x] = real_keys(p, asked[x]);
          const ScoreTerms terms = tile_scores(s, rel, tile, far, i0, j0, real, left, right, rel_rows,
                                               TileRows{keys_at(stage), kPanel, 0}, whole);
          if (p.key_rel.data != nullptr) free(&signals->k_free[stage]);
          if (n == count - 1) free(&signals->q_free);
          float shrink[2];
          const bool grows = update_softmax(s, terms, top, total, shrink);
          // After the first tiles it is rare that one of 16 rows finds a larger score.
          if (n > 0 && __any_sync(kAllLanes, grows)) {
#pragma unroll
            for (int c = 0; c < D / 8; ++c)
              for (int e = 0; e < 4; ++e) out[c][e] *= shrink[e / 2];
          }
          narrow_weights(j0);
          mbarrier_wait(&signals->v_full[stage], round_trip & 1);
          if (!seen.has(j0, (real[0] & real[1] & real[2] & real[3]) == ~0u)) clear_hidden();
          barrier_sync(own_turn, kTurnThreads);
          multiply_values();
          if (++stage == stages) stage = 0, ++round_trip;
          if (++n == count) break;
          multiply_keys();
          barrier_arrive(other_turn, kTurnThreads);
          ask(first + n * kKeys);
        }
        barrier_arrive(other_turn, kTurnThreads);
        wgmma_wait<0>();
        keep_registers(out);
        free(&signals->v_free[stage == 0 ? stages - 1 : stage - 1]);
      }
      store_warp_results<T, D>(p, t, tile, b, h, own, out, top, total, strip, spoiled, lane);
    }
    if (group == 0) barrier_sync(own_turn, kTurnThreads);  // as often as the other warpgroup has arrived
  }
}

}  // namespace ck::cuda
