// The backward pass of attention on GPUs of compute capability 9.0, first part: what backward_queries.cuh makes, by
// warpgroups as in forward_warpgroups.cuh. A block has 128 queries, with their rows of q and of d(out) in shared
// memory, and meets 64 keys at a time. In registers, a warpgroup has the products q k^T and d(out) v^T of its 64
// queries with these keys, and d(q).
#pragma once

#include "csrc/cuda/attention/warpgroup_ring.cuh"
#include "csrc/cuda/attention/warpgroup_strips.cuh"

namespace ck::cuda {

// Where products of a warp's 16 queries go: to d(q), in registers, or to the sums for rel_query, in shared memory.
template <int D>
struct QuerySums {
  float (&registers)[D / 8][4];
  float scale;           // of the former
  SharedSums rel_query;  // sums == nullptr: there is no rel_query

  CK_DEVICE float factor() const { return rel_query.sums == nullptr ? scale : 1.0f; }
  template <class Product>
  CK_DEVICE void add(int64_t size, int lane, const Product& product) const {
    if (rel_query.sums != nullptr) return rel_query.add(size, lane, product);
    add_to_registers<D>(registers, size, product);
  }
};

// Blocks: parts, heads, batch rows; a block takes every parts-th tile of 128 queries. p.query_parts counts warps.
template <class T, int D>
CK_GLOBAL(kWarpgroupThreads, 1)
void attention_backward_queries_warpgroups(const CK_PARAM AttentionBackward p, const CK_PARAM TensorTables t,
                                           const CK_PARAM TensorMap q_map, const CK_PARAM TensorMap k_map,
                                           const CK_PARAM TensorMap v_map, const CK_PARAM TensorMap grad_map, int tiles,
                                           int stages) {
  if constexpr (!kWarpgroups) {
    stop_kernel();
  } else {
    constexpr int kRows = kWarpgroupRows, kKeys = kWarpgroupGradKeys;
    constexpr int kOwnBytes = 2 * kRows * D, kOwnPanel = 128 * kRows, kKeyBytes = 2 * kKeys * D, kPanel = 128 * kKeys;
    const int lane = threadIdx.x % 32, warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0);
    const int parts = static_cast<int>(p.query_parts) / kWarpgroupWarps;
    const int part = blockIdx.x % parts, unit = blockIdx.x / parts;
    const int b = unit / static_cast<int>(p.heads), h = unit % static_cast<int>(p.heads);
    const int W = static_cast<int>(p.window());
    const bool low_rank = p.rel_query.data != nullptr;
    const int rel_pitch = low_rank ? static_cast<int>(t.rank_pitch) + 8 : 0;

    auto* const signals = reinterpret_cast<RingSignals*>(shared_memory_1024());
    char* const q_rows = shared_memory_1024() + kSignalBytes;
    char* const g_rows = q_rows + kOwnBytes;
    char* const ring = g_rows + kOwnBytes;
    char* const r_rows = ring + stages * 2 * kKeyBytes;
    float* const scratch = reinterpret_cast<float*>(r_rows + kRows * 2 * rel_pitch);
    const int score_pitch = static_cast<int>(query_score_pitch(W, t.strip_pitch));
    const int grad_pitch = static_cast<int>(grad_pitch_of(W, kKeys));
    const int sum_pitch = low_rank ? static_cast<int>(t.rank_pitch) + 4 : 0;
    const int strips_pitch = p.has_columns() ? static_cast<int>(query_strips_pitch(W, t.strip_pitch)) : 0;
    const int strip_floats = max(kStageFloats, 16 * strips_pitch), warp_floats = strip_floats + 16 * sum_pitch;
    const auto keys_at = [&](int stage) { return ring + stage * 2 * kKeyBytes; };
    const auto values_at = [&](int stage) { return keys_at(stage) + kKeyBytes; };

    begin_signals(*signals, stages, 1);
    // Without a depthwise term delta follows from the output; with one it takes a walk of its own.
    const int first_walk = p.value_conv.data != nullptr ? 0 : 1, walks = p.needs_queries() ? 2 : 1;

    if (warp < 4) {
      give_registers<kCopyRegisters>();
      if (threadIdx.x != 0) return;
      prefetch_tensor_map(q_map);
      prefetch_tensor_map(k_map);
      prefetch_tensor_map(v_map);
      prefetch_tensor_map(grad_map);
      const int g = h / static_cast<int>(p.sharing());
      RingPlace place{stages};
      unsigned own_loads = 0;
      for (int n = part; n < tiles; n += parts) {
        const AttentionTile tile(p, tiles - 1 - n, kRows, false);
        int first = 0;
        const int count = tiles_of_keys<kKeys>(p, tile, first);
        if (count == 0) continue;
        mbarrier_wait(&signals->own_free, (own_loads++ & 1) ^ 1);
        mbarrier_arrive_expect(&signals->own_full, 2 * kOwnBytes);
        for (int r = 0; r < kRows; r += kKeys) {
          load_panels<D>(q_rows + r * 128, kOwnPanel, q_map, tile.first + r, h, b, &signals->own_full);
          load_panels<D>(g_rows + r * 128, kOwnPanel, grad_map, tile.first + r, h, b, &signals->own_full);
        }
        for (int m = 0; m < (walks - first_walk) * count; ++m) {
          const int row = first + m % count * kKeys;
          uint64_t* const full = &signals->full[place.stage];
          mbarrier_wait(&signals->free[place.stage], place.parity() ^ 1);
          mbarrier_arrive_expect(full, 2 * kKeyBytes);
          load_panels<D>(keys_at(place.stage), kPanel, k_map, row, g, b, full);
          load_panels<D>(values_at(place.stage), kPanel, v_map, row, g, b, full);
          place.advance();
        }
      }
      return;
    }

    take_registers<kProductRegisters>();
    const int worker = warp - 4, group = worker / 4, own = worker * 16;
    const WarpgroupTurn turn(group);
    float* const strip = scratch + worker * warp_floats;
    const float* const edges = t.key_edges == nullptr ? nullptr : t.key_edges + int64_t{unit} * 2 * p.keys;
    // Whether a strip has all columns, with what lies beside the window in front and behind.
    const bool whole = p.has_columns() && t.strip_pitch >= W + 2;
    Relative<T> rel(p, t, h, lane, edges, whole ? strip + 1 : strip);
    rel.pitch = score_pitch;
    const TileRows rel_rows = low_rank ? TileRows{r_rows + own * 2 * rel_pitch, 0, 2 * rel_pitch}
                                       : TileRows{q_rows + own * 128, kOwnPanel, 0};
    const bool has_strip = p.has_query_columns() && p.needs_queries();
    const bool is_band = low_rank && !t.whole_strips && p.grad_bias == nullptr;
    float* const sums = low_rank ? strip + strip_floats : nullptr;
    // This warp's partial sums, found anew where they are needed.
    const auto partial = [&] {
      const int64_t piece = int64_t{blockIdx.x} * kWarpgroupWarps + opaque(worker);
      return p.grad_query_rel == nullptr ? nullptr : static_cast<float*>(p.partial_query_rel) + piece * W * p.rank;
    };
    const auto partial_bias = [&] {
      const int64_t piece = int64_t{blockIdx.x} * kWarpgroupWarps + opaque(worker);
      return p.grad_bias == nullptr ? nullptr : static_cast<float*>(p.partial_bias) + piece * W;
    };
    if (float* const to = partial())
      for (int64_t e = lane; e < W * p.rank; e += 32) to[e] = 0;
    if (float* const to = partial_bias())
      for (int e = lane; e < W; e += 32) to[e] = 0;
    const float scale = static_cast<float>(p.scale), rel_scale = static_cast<float>(p.rel_scale);
    const float keep_scale = static_cast<float>(p.keep_scale);

    RingPlace place{stages};
    unsigned own_loads = 0;
#pragma unroll 1
    for (int n = tiles - 1 - part; n >= 0; n -= parts) {
      const AttentionTile tile(p, n, kRows, false);
      if (tile.count <= 0) continue;
      const int i0 = tile.first + own, end = tile.first + tile.count, row = lane / 4;
      int first = 0;
      const int count = tiles_of_keys<kKeys>(p, tile, first);
      float lse[2], delta[2] = {}, grad_q[D / 8][4];
      set_zero(grad_q);
      bool sees[2];
      for (int half = 0; half < 2; ++half) {
        const int i = i0 + row + 8 * half;
        const float found = i < end ? at<float>(p.lse, b, h, i) : -infinity<float>();
        sees[half] = found != -infinity<float>();
        // A query that sees nothing, or does not exist, has no probabilities.
        lse[half] = sees[half] ? found * kLog2e : infinity<float>();
      }
      const auto finish_delta = [&](float sum0, float sum1) {
        for (int half = 0; half < 2; ++half) {
          const int i = i0 + row + 8 * half;
          delta[half] = sees[half] ? (half == 0 ? sum0 : sum1) : 0.0f;
          if (p.grad_lse.data != nullptr && sees[half]) delta[half] -= at<float>(p.grad_lse, b, h, i);
          if (lane % 4 == 0 && i < end) static_cast<float*>(p.delta)[int64_t{unit} * p.queries + i] = delta[half];
        }
      };
      if (low_rank && p.needs_queries())
        for (int e = lane; e < 16 * sum_pitch; e += 32) sums[e] = 0;
      if (count == 0) {
        finish_delta(0, 0);
      } else {
        if (low_rank) {
          turn.meet_own();  // the rows of the last tile have been read
          copy_tile<64>(reinterpret_cast<T*>(r_rows) + group * 64 * rel_pitch, rel_pitch, p.rel_query, b, h,
                        tile.first + group * 64, Range{tile.first, end}, static_cast<int>(p.rank),
                        static_cast<int>(t.rank_pitch), t.rank_vectors, threadIdx.x % 128);
          cp_async_commit();
          cp_async_wait<0>();
          turn.meet_own();
        }
        mbarrier_wait(&signals->own_full, own_loads++ & 1);
        clear_absent<D>(turn, q_rows + group * 64 * 128, kOwnPanel,
                        [&](int x) { return those_in(Range{tile.first, end}, tile.first + group * 64 + x); });
        const auto gradient_strip = [&] {
          return GradientStrip<T, TypedRows<T>, QuerySums<D>>{
              .strip = t.whole_strips ? strip + 16 * score_pitch : strip,
              .pitch = grad_pitch,
              .whole = t.whole_strips,
              .rows = {rel_rows},
              .table = rel.query_rel(),
              .terms = t.query_terms,
              .W = W,
              .table_pitch = p.query_rel.data != nullptr ? t.rank_pitch : 0,
              .wants_sums = p.query_rel.data != nullptr,
              .sums = {grad_q, rel_scale / scale, {sums, sum_pitch}},
              .partial = partial(),
              .size = static_cast<int>(p.rank),
              .bias = partial_bias(),
              .lane = opaque(lane)};
        };
        float left[2], right[2], outer[2][2] = {};  // outer: first the sums for delta
        const auto begin_scores = [&] {
          if (whole)
            fill_whole_strip<D <= 64 ? 3 : 1>(left, right, rel, rel_rows);
          else
            rel.query_edges(left, right, rel_rows);
        };
        begin_scores();
        if (has_strip && t.whole_strips) gradient_strip().clear();
        if (first_walk == 1) {
          float sum = 0;
          const int i = i0 + lane / 2, channels = static_cast<int>(p.channels);
          if (i < end)
#pragma unroll 2
            for (int d = lane % 2 * 8; d < channels; d += 16) {
              float grad[8], out[8];
              unpack_vector(grad, reinterpret_cast<const T*>(piece_of_row(g_rows, kOwnPanel, own + lane / 2, d / 8)));
              load_channels(out, at<T>(p.out, b, i, h) + d * p.out.channel, p.out.channel, channels - d, t.vectors);
#pragma unroll
              for (int e = 0; e < 8; ++e) sum += grad[e] * out[e];
            }
          sum += __shfl_xor_sync(kAllLanes, sum, 1);
          finish_delta(__shfl_sync(kAllLanes, sum, 2 * row), __shfl_sync(kAllLanes, sum, 2 * (row + 8)));
        }

        float s[kKeys / 8][4], ds[kKeys / 8][4];
        uint32_t rounded[kKeys / 16][4];
        const auto multiply_keys = [&] {
          mbarrier_wait(&signals->full[place.stage], place.parity());
          const Operand q = operand(q_rows + group * 64 * 128), grad = operand(g_rows + group * 64 * 128);
          const Operand keys = operand(keys_at(place.stage)), values = operand(values_at(place.stage));
          wgmma_fence();
          start_pairs<T, D, kKeys>(s, q, kOwnPanel, keys, kPanel);
          start_pairs<T, D, kKeys>(ds, grad, kOwnPanel, values, kPanel);
          wgmma_commit();
        };
        const auto multiply_gradients = [&] {
          const Operand keys = operand(keys_at(place.stage), kPanel);
          keep_registers(rounded);
          wgmma_fence();
          start_rows<T, D>(grad_q, rounded, keys);
          wgmma_commit();
        };
        unsigned asked[kKeys / 32], real[kKeys / 32];  // of the mask, asked before a wait
        const FarTiles<Side::kQueries, kKeys, 16> far(p, tile, i0);
        const SeenTiles<kKeys> seen(p, tile);

        const int all = (walks - first_walk) * count;
        if (all > 0) {
          turn.begin();
          keep_registers(grad_q);
          multiply_keys();
          turn.end();
          ask_masks(asked, p, b, first, lane);
#pragma unroll 1
          for (int m = 0;;) {
            const bool for_delta = first_walk == 0 && m < count;
            const int j0 = first + (m < count ? m : m - count) * kKeys;
            wgmma_wait<0>();
            keep_registers(s);
            keep_registers(ds);
            keep_registers(grad_q);
            if (m > 0) release(&signals->free[place.before()]);
            if (!p.qk) leave_out(s);
            if (first_walk == 0 && m == count) {
              leave_out(grad_q);
              begin_scores();
            }
            real_keys(real, p, asked);
            const bool all_real = all_of(real);
            uint32_t pairs_seen[kKeys / 32];
            const TileRows key_rows{keys_at(place.stage), kPanel, 0};
            const PairTile<Side::kQueries, kKeys> all_pairs(p, tile, i0, j0);
            ScoreTerms terms{1, {}, -1, 0};
            if (far.has(j0, all_real)) {
              terms = far_tile_scores<T, kKeys>(s, rel, far.is_left(j0), j0, left, right);
              for (uint32_t& seen_pairs : pairs_seen) seen_pairs = kEveryPair;
            } else if (whole || !p.has_columns()) {
              const FarTiles<Side::kQueries, kKeys, 16> parts(p, tile, opaque(i0));  // in no registers before
              terms = near_tile_scores<T, kKeys, 1>(s, pairs_seen, rel, tile, parts, i0, j0, real, left, right,
                                                    rel_rows, key_rows, true);
            } else {
              near_scores_of_queries<T, kKeys>(s, pairs_seen, rel, all_pairs, real, left, right, rel_rows, key_rows);
            }
#pragma unroll
            for (int sub = 0; sub < kKeys / 32; ++sub) {
              float (&part_ds)[4][4] = reinterpret_cast<float (&)[4][4]>(ds[4 * sub]);
              const PairTile<Side::kQueries, 32> pairs(p, tile, i0, j0 + 32 * sub);
              if (p.seed != nullptr) {
                const uint32_t kept = draw_fragments(p, static_cast<uint64_t>(*p.seed), b, h, pairs, lane);
#pragma unroll
                for (int x = 0; x < 4; ++x)
                  for (int e = 0; e < 4; ++e) part_ds[x][e] *= (kept >> (4 * x + e) & 1u) != 0 ? keep_scale : 0.0f;
                keep_registers(part_ds);
              }
#pragma unroll
              for (int x = 0; x < 4; ++x)
                for (int e = 0; e < 4; ++e) {
                  const float probable =
                      fast_exp2(s[4 * sub + x][e] * terms.factor + (terms.added[e / 2] - lse[e / 2]));
                  part_ds[x][e] = probable * (part_ds[x][e] - delta[e / 2]);  // delta is 0 on the first walk
                }
              select_seen(part_ds, pairs_seen[sub] & ((sees[0] ? 0x3333u : 0u) | (sees[1] ? 0xCCCCu : 0u)));
            }
            if (for_delta) {
#pragma unroll
              for (int x = 0; x < kKeys / 8; ++x)
                for (int e = 0; e < 4; ++e) outer[0][e / 2] += ds[x][e];
            } else if (has_strip && (p.clips() || !all_pairs.one_sided())) {
              if (is_band && !all_pairs.one_sided())
                BandGradients<T, kKeys>{reinterpret_cast<T*>(strip), rel, rel_rows, {sums, sum_pitch}, partial()}.add(
                    ds, all_pairs, outer);
              else
                scatter_gradients(ds, gradient_strip(), all_pairs, outer);
            }
            if (for_delta && m == count - 1) {
              finish_delta(row_sum(outer[0][0]), row_sum(outer[0][1]));
              outer[0][0] = outer[0][1] = 0;
            }
            // Keys that some query does not see must be finite, since their gradients are 0: all warps clear the
            // others, which are added at the end, once they have been multiplied with.
            if (!for_delta && (!p.qk || !seen.has(j0, all_real))) {
              turn.meet();
              if (clear_rows<T, D, kKeys / 2>(keys_at(place.stage), kPanel, group * kKeys / 2))
                signals->spoil(own_loads);
              fence_async_proxy();
              turn.meet();
            }
            round_sums<T>(rounded, ds);
            if (for_delta || !p.qk) leave_out(rounded);
            turn.begin();
            multiply_gradients();
            place.advance();
            if (++m == all) break;
            multiply_keys();
            turn.end();
            ask_masks(asked, p, b, first + (m < count ? m : m - count) * kKeys, lane);
          }
          turn.end();
          wgmma_wait<0>();
          keep_registers(grad_q);
          release(&signals->free[place.before()]);
        }
        if (has_strip) gradient_strip().finish(outer, p.clips());
        release(&signals->own_free);
      }
      if (!p.needs_queries()) continue;
      if (low_rank && p.grad_rel_query.data != nullptr) {
        const int rank = static_cast<int>(p.rank);
        __syncwarp();
#pragma unroll 1
        for (int v = lane; v < 16 * ((rank + 7) / 8); v += 32) {
          const int r = v % 16, d = v / 16 * 8;
          if (i0 + r >= end) continue;
          float value[8];
          for (int e = 0; e < 8; ++e) value[e] = sums[r * sum_pitch + d + e] * rel_scale;
          store_channels(at<T>(p.grad_rel_query, b, i0 + r, h) + d * p.grad_rel_query.channel, p.grad_rel_query.channel,
                         rank - d, t.rank_vectors, value);
        }
        __syncwarp();
      }
      if (p.grad_q.data == nullptr) continue;
      const bool spoiled = count > 0 && signals->is_spoiled(own_loads);
      const float factor[2] = {sees[0] ? scale : 0.0f, sees[1] ? scale : 0.0f};
      each_row<D>(grad_q, factor, strip, lane, [&](int r, int d, float (&value)[8]) {
        const int i = i0 + r, channels = static_cast<int>(p.channels);
        if (i >= end || d >= channels) return;
        if (spoiled && p.qk && at<float>(p.lse, b, h, i) != -infinity<float>())
          add_spoiled<T>(value, p.k, b, opaque(h) / static_cast<int>(p.sharing()), visible_keys(p, tile, i), d,
                         channels - d, t.vectors, [&](int j) { return real_key(p, b, j); });
        store_channels(at<T>(p.grad_q, b, i, h) + d * p.grad_q.channel, p.grad_q.channel, channels - d, t.vectors,
                       value);
      });
    }
    turn.finish();
  }
}

}  // namespace ck::cuda
