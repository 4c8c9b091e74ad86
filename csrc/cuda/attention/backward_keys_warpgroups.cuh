// The backward pass of attention on GPUs of compute capability 9.0, second part: what backward_keys.cuh makes, by
// warpgroups as in backward_queries_warpgroups.cuh, with the roles of rows and columns exchanged. A block has 128 keys
// with their values, and meets 64 queries at a time, or 32 of more than 64 channels, whose sums d(k) and d(v) take most
// of the registers. A warp of its own brings what comes with the queries: lse, delta and what their terms add left and
// right of the window, and their rows of rel_query. Needs delta.
#pragma once

#include "csrc/cuda/attention/taps.cuh"
#include "csrc/cuda/attention/warpgroup_keys.cuh"

namespace ck::cuda {

// Blocks: parts, groups, batch rows; a block takes every parts-th tile of 128 keys. p.key_parts counts warps.
template <class T, int D>
CK_GLOBAL(kWarpgroupThreads, 1)
void attention_backward_keys_warpgroups(const CK_PARAM AttentionBackward p, const CK_PARAM TensorTables t,
                                        const CK_PARAM TensorMap q_map, const CK_PARAM TensorMap k_map,
                                        const CK_PARAM TensorMap v_map, const CK_PARAM TensorMap grad_map, int tiles,
                                        int stages) {
  if constexpr (!kWarpgroups) {
    stop_kernel();
  } else {
    constexpr int kRows = kWarpgroupRows, kQueries = kWarpgroupQueries<D>;
    constexpr int kOwnBytes = 2 * kRows * D, kOwnPanel = 128 * kRows;
    constexpr int kQueryBytes = 2 * kQueries * D, kPanel = 128 * kQueries;
    const int lane = threadIdx.x % 32, warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0);
    const auto parts_of = [&] { return opaque(static_cast<int>(p.key_parts)) / kWarpgroupWarps; };
    const int sharing = static_cast<int>(p.sharing());
    const int W = static_cast<int>(p.window()), channels = static_cast<int>(p.channels);
    const int rel_pitch = p.rel_query.data != nullptr ? 2 * (static_cast<int>(t.rank_pitch) + 8) : 0;  // in bytes

    auto* const signals = reinterpret_cast<RingSignals*>(shared_memory_1024());
    char* const k_rows = shared_memory_1024() + kSignalBytes;
    char* const v_rows = k_rows + kOwnBytes;
    char* const ring = v_rows + kOwnBytes;
    auto* const scalars = reinterpret_cast<QueryScalars<kQueries>*>(ring + stages * 2 * kQueryBytes);
    float* const scratch = reinterpret_cast<float*>(scalars + stages);
    using Strip = PairStrip<16>;
    const int grad_pitch = static_cast<int>(grad_pitch_of(W, kQueries));
    const int warp_floats =
        p.has_columns()
            ? max(kStageFloats, 16 * static_cast<int>(key_strips_pitch(W, kQueries, p.key_rel.data != nullptr)))
            : kStageFloats;
    char* const r_rows = reinterpret_cast<char*>(scratch + kWarpgroupWarps * warp_floats);
    const auto queries_at = [&](int stage) { return ring + stage * 2 * kQueryBytes; };
    const auto grads_at = [&](int stage) { return queries_at(stage) + kQueryBytes; };

    // Found anew for every tile.
    const auto tile_of = [&](int n) {
      const int parts = parts_of(), unit = blockIdx.x / parts, groups = static_cast<int>(p.groups);
      return KeyTile(p, n, unit / groups, unit % groups, blockIdx.x % parts);
    };
    auto* const kept_tiles = reinterpret_cast<KeyTile*>(signals + 1);  // of each warp
    static_assert(sizeof(RingSignals) % alignof(KeyTile) == 0 &&
                  sizeof(RingSignals) + (kWarpgroupWarps + 2) * sizeof(KeyTile) <= kSignalBytes);
    begin_signals(*signals, stages, 2);

    if (warp < 4) {
      give_registers<kKeyCopyRegisters>();
      if (warp > 1 || (warp == 0 && lane != 0)) return;
      KeyTile& kept = kept_tiles[kWarpgroupWarps + warp];
      RingPlace place{stages};
      unsigned own_loads = 0;
#pragma unroll 1
      for (int n = blockIdx.x % parts_of(); n < tiles; n += parts_of()) {
        if (warp == 1) __syncwarp();
        if (lane == 0) kept = tile_of(n);
        if (warp == 1) __syncwarp();
        if (kept.queries.first >= kept.queries.end) continue;
        const int &b = kept.b, &g = kept.g;
        if (warp == 0) {
          mbarrier_wait(&signals->own_free, (own_loads++ & 1) ^ 1);
          mbarrier_arrive_expect(&signals->own_full, 2 * kOwnBytes);
          for (int r = 0; r < kRows; r += kQueries) {
            load_panels<D>(k_rows + r * 128, kOwnPanel, k_map, kept.tile.first + r, g, b, &signals->own_full);
            load_panels<D>(v_rows + r * 128, kOwnPanel, v_map, kept.tile.first + r, g, b, &signals->own_full);
          }
        }
        int i0 = kept.queries.first;
#pragma unroll 1
        for (int h = g * sharing; h < (g + 1) * sharing; next_queries<kQueries>(kept.queries, h, i0)) {
          uint64_t* const full = &signals->full[place.stage];
          mbarrier_wait(&signals->free[place.stage], place.parity() ^ 1);
          if (warp == 0) {
            mbarrier_arrive_expect(full, 2 * kQueryBytes);
            load_panels<D>(queries_at(place.stage), kPanel, q_map, i0, h, b, full);
            load_panels<D>(grads_at(place.stage), kPanel, grad_map, i0, h, b, full);
          } else {
            load_scalars<T, kQueries>(scalars[place.stage], r_rows + place.stage * kQueries * rel_pitch, rel_pitch, p,
                                      t, b, h, i0, kept.queries, lane);
            __syncwarp();
            if (lane == 0) mbarrier_arrive(full);
          }
          place.advance();
        }
      }
      return;
    }

    take_registers<kKeyProductRegisters>();
    const int group = warp / 4 - 1, own = group * 64 + warp % 4 * 16, worker = group * 4 + warp % 4;
    const int row = lane / 4, pair = lane % 4 * 2;
    const WarpgroupTurn turn(group);
    float* const strip = scratch + worker * warp_floats;
    const bool scores = p.needs_keys(), has_strip = p.key_rel.data != nullptr && scores;
    const auto partial_of = [&](int b, int h, int part) {
      return static_cast<float*>(p.partial_key_rel) +
             ((int64_t{b} * p.heads + h) * p.key_parts + part * kWarpgroupWarps + worker) * W * channels;
    };
    if (p.grad_key_rel != nullptr) {
      const KeyTile any = tile_of(0);
      for (int h = any.g * sharing; h < (any.g + 1) * sharing; ++h) {
        float* const to = partial_of(any.b, h, any.part);
        for (int64_t e = lane; e < int64_t{W} * channels; e += 32) to[e] = 0;
      }
    }
    const float keep_scale = static_cast<float>(p.keep_scale);

    RingPlace place{stages};
    unsigned own_loads = 0;
#pragma unroll 1
    for (int n = blockIdx.x % parts_of(); n < tiles; n += parts_of()) {
      KeyTile& kept = kept_tiles[worker];
      __syncwarp();
      if (lane == 0) kept = tile_of(n);
      __syncwarp();
      const AttentionTile& tile = kept.tile;
      const int &b = kept.b, &g = kept.g;
      const Range& queries = kept.queries;
      if (tile.count <= 0) continue;
      const int j0 = tile.first + own;
      const bool seen = queries.first < queries.end;  // by some query
      float grad_k[D / 8][4], grad_v[D / 8][4];
      set_zero(grad_k);
      set_zero(grad_v);
      if (seen) {
        const unsigned real = real_keys(p, ask_mask(p, b, j0, lane));
        const TileRows k_own{k_rows + own * 128, kOwnPanel, 0};
        __syncwarp();
        if (lane == 0) kept.find_far(p, j0, real);
        __syncwarp();
        // Whether all queries of a tile see all keys of the block.
        const auto all_see = [&](int i0) { return i0 >= kept.all_see.first && i0 + kQueries <= kept.all_see.end; };
        // What this lane has summed left and right of the window, where it takes no registers.
        float (&outer)[2][2] = *(reinterpret_cast<float (*)[2][2]>(strip + warp_floats - 16 * kOuterPitch) + lane);
        int h = g * sharing, i0 = queries.first;
        const auto relative = [&] {
          const float* const edges =
              t.query_edges == nullptr ? nullptr : t.query_edges + (int64_t{b} * p.heads + h) * 2 * p.queries;
          Relative<T> rel(p, t, h, lane, edges, strip);
          rel.pitch = Strip::kPitch;
          return rel;
        };
        const auto gradient_strip = [&](const Relative<T>& rel) {
          return GradientStrip<T, TypedRows<T>, KeySums<D>>{
              .strip = t.whole_strips ? strip + 16 * Strip::kPitch : strip,
              .pitch = grad_pitch,
              .whole = t.whole_strips,
              .rows = {k_own},
              .table = rel.key_rel(),
              .terms = t.key_terms,
              .W = W,
              .table_pitch = t.channel_pitch,
              .wants_sums = true,
              .sums = {grad_k},
              .partial = p.grad_key_rel == nullptr ? nullptr : partial_of(b, h, kept.part),
              .size = channels,
              .bias = nullptr,
              .lane = lane};
        };
        const auto begin_head = [&] {
          if (!has_strip) return;
          for (int half = 0; half < 2; ++half) outer[0][half] = outer[1][half] = 0;
          if (t.whole_strips) gradient_strip(relative()).clear();
        };

        // The first channels of the keys: products need not read them again.
        constexpr int kHeld = D <= 64 ? 4 : 1;
        uint32_t held[kHeld][4];
        float s[kQueries / 8][4], ds[kQueries / 8][4];
        uint32_t weights[kQueries / 16][4], rounded[kQueries / 16][4];
        const auto multiply_queries = [&] {
          mbarrier_wait(&signals->full[place.stage], place.parity());
          const Operand k = operand(k_rows + group * 64 * 128), v = operand(v_rows + group * 64 * 128);
          const Operand q = operand(queries_at(place.stage)), grad = operand(grads_at(place.stage));
          keep_registers(held);
          wgmma_fence();
#pragma unroll
          for (int n = 0; n < kHeld; ++n) wgmma<T, kQueries>(s, held[n], q.further(n * 32), n > 0);
#pragma unroll
          for (int n = kHeld; n < D / 16; ++n)
            wgmma<T, kQueries>(s, k.further(n / 4 * kOwnPanel + n % 4 * 32), q.further(n / 4 * kPanel + n % 4 * 32),
                               true);
          start_pairs<T, D, kQueries>(ds, v, kOwnPanel, grad, kPanel);
          wgmma_commit();
        };
        const auto multiply_gradients = [&] {
          const Operand q = operand(queries_at(place.stage), kPanel), grad = operand(grads_at(place.stage), kPanel);
          keep_registers(weights);
          keep_registers(rounded);
          wgmma_fence();
          start_rows<T, D>(grad_v, weights, grad);
          start_rows<T, D>(grad_k, rounded, q);
          wgmma_commit();
        };

        mbarrier_wait(&signals->own_full, own_loads++ & 1);
        clear_absent<D>(turn, k_rows + group * 64 * 128, kOwnPanel, [&](int x) {
          const int first = tile.first + group * 64 + x;
          return real_keys(p, ask_mask(p, b, first, lane)) & those_in(Range{tile.key_begin, tile.end()}, first);
        });
        for (int n = 0; n < kHeld; ++n) k_own.load_left(held[n], 0, 16 * n, lane);
        turn.begin();
        keep_registers(grad_k);
        keep_registers(grad_v);
        multiply_queries();
        turn.end();
#pragma unroll 1
        for (bool begun = false;; begun = true) {
          wgmma_wait<0>();
          keep_registers(s);
          keep_registers(ds);
          keep_registers(grad_k);
          keep_registers(grad_v);
          if (begun) release(&signals->free[place.before()]);
          if (i0 == queries.first) begin_head();
          const Relative<T> rel = relative();
          if (!p.qk) leave_out(s);
          // What key_rel adds left (0) or right (1) of the window, of a lane's keys. Read where it is needed.
          const auto key_edge = [&](int side, int half) {
            const int64_t j = min(int64_t{opaque(j0)} + row + 8 * half, p.keys - 1);
            return t.key_edges[((int64_t{b} * p.heads + h) * 2 + side) * p.keys + j];
          };
          const QueryScalars<kQueries>& of_queries = scalars[place.stage];
          const FarRanges far = kept.far;
          unsigned blind[kQueries / 32], any_blind = 0;  // queries that see nothing
#pragma unroll
          for (int sub = 0; sub < kQueries / 32; ++sub) {
            blind[sub] = __ballot_sync(kAllLanes, of_queries.is_blind(32 * sub + lane));
            any_blind |= blind[sub];
          }
#pragma unroll
          for (int sub = 0; sub < kQueries / 32; ++sub) {
            float (&part_s)[4][4] = reinterpret_cast<float (&)[4][4]>(s[4 * sub]);
            float (&part_ds)[4][4] = reinterpret_cast<float (&)[4][4]>(ds[4 * sub]);
            const PairTile<Side::kKeys, 32> pairs(p, tile, opaque(j0), i0 + 32 * sub);
            const int begin = pairs.other;
            const bool far_left = begin >= far.left.first && begin < far.left.end,
                       far_right = begin >= far.right.first && begin < far.right.end;
            uint32_t seen_of = kEveryPair;
            int side = p.has_columns() ? far_left ? 0 : 2 : 1;  // of `added`; -1: the window crosses the tile
            if (any_blind != 0 || !(far_left || far_right)) {
              if (p.has_columns()) side = !pairs.one_sided() ? -1 : pairs.is_left() ? 0 : 2;
              if (any_blind != 0 || !pairs.seen(real)) {
                seen_of = seen_pairs(pairs, real, lane);
                for (int x = 0; x < 4; ++x)
                  for (int e = 0; e < 4; ++e) seen_of &= ~((blind[sub] >> (8 * x + pair + e % 2) & 1u) << (4 * x + e));
              }
            }
            if (side >= 0) {
              float of_keys[2] = {};
              if (t.key_edges != nullptr)
                for (int half = 0; half < 2; ++half) of_keys[half] = key_edge(side / 2, half);
#pragma unroll
              for (int x = 0; x < 4; ++x) {
                const float2 added = of_queries.added_at(side, 32 * sub + 8 * x, lane);
                for (int e = 0; e < 4; ++e)
                  part_s[x][e] = part_s[x][e] * t.score_factor + ((e % 2 == 0 ? added.x : added.y) + of_keys[e / 2]);
              }
            } else {
              near_scores_of_keys(part_s, rel, PairTile<Side::kQueries, 16>(p, tile, i0 + 32 * sub, j0), of_queries,
                                  32 * sub, key_edge, k_own,
                                  TileRows{rel_pitch != 0 ? r_rows + (place.stage * kQueries + 32 * sub) * rel_pitch
                                                          : queries_at(place.stage) + 32 * sub * 128,
                                           kPanel, rel_pitch});
            }
#pragma unroll
            for (int x = 0; x < 4; ++x)
              for (int e = 0; e < 4; ++e) part_s[x][e] = fast_exp2(part_s[x][e]);
            float2 delta[4];
#pragma unroll
            for (int x = 0; x < 4; ++x) delta[x] = of_queries.delta_at(32 * sub + 8 * x, lane);
            if (p.seed != nullptr) {
              const uint32_t kept = draw_fragments(p, static_cast<uint64_t>(*p.seed), b, h, pairs, lane);
#pragma unroll
              for (int x = 0; x < 4; ++x)
                for (int e = 0; e < 4; ++e) {
                  const float keep = (kept >> (4 * x + e) & 1u) != 0 ? keep_scale : 0.0f;
                  part_ds[x][e] = part_s[x][e] * (part_ds[x][e] * keep - (e % 2 == 0 ? delta[x].x : delta[x].y));
                  part_s[x][e] *= keep;
                }
              keep_registers(part_s);
            } else {
#pragma unroll
              for (int x = 0; x < 4; ++x)
                for (int e = 0; e < 4; ++e)
                  part_ds[x][e] = part_s[x][e] * (part_ds[x][e] - (e % 2 == 0 ? delta[x].x : delta[x].y));
            }
            select_seen(part_s, seen_of);
            select_seen(part_ds, seen_of);
          }
          const bool last = i0 + kQueries >= queries.end;  // of this head
          if (has_strip) {
            scatter_gradients(ds, gradient_strip(rel), PairTile<Side::kKeys, kQueries>(p, tile, j0, i0), outer);
            if (last) gradient_strip(rel).finish(outer, p.clips());
          }
          // Rows of queries that do not see some key must be finite, since their weights and gradients are 0: all warps
          // clear the others, which are added at the end, once they have been multiplied with.
          if (any_blind != 0 || !p.qk || !all_see(i0)) {
            turn.meet();
            const bool in_q = clear_rows<T, D, kQueries / 2>(queries_at(place.stage), kPanel, group * kQueries / 2);
            const bool in_grad = clear_rows<T, D, kQueries / 2>(grads_at(place.stage), kPanel, group * kQueries / 2);
            if (in_q || in_grad) signals->spoil(own_loads);
            fence_async_proxy();
            turn.meet();
          }
          round_sums<T>(weights, s);
          round_sums<T>(rounded, ds);
          if (!p.qk) leave_out(rounded);
          turn.begin();
          multiply_gradients();
          place.advance();
          if (last && h + 1 == (g + 1) * sharing) break;
          multiply_queries();
          turn.end();
          next_queries<kQueries>(queries, h, i0);
        }
        turn.end();
        wgmma_wait<0>();
        keep_registers(grad_k);
        keep_registers(grad_v);
        release(&signals->free[place.before()]);
        release(&signals->own_free);
      }
      const bool spoiled = seen && signals->is_spoiled(own_loads);
      // `from`: rows of the queries.
      const auto write = [&](const float (&sums)[D / 8][4], float factor, const HeadRows& to, const HeadRows& from,
                             bool taps) {
        each_row<D>(sums, {factor, factor}, strip, lane, [&](int r, int d, float (&value)[8]) {
          const int j = j0 + r;
          if (j < tile.key_begin || j >= tile.end() || d >= channels) return;
          const bool there = real_key(p, b, j);
          if (!there)
            for (int e = 0; e < 8; ++e) value[e] = 0;
          if (there && (taps || (spoiled && from.data != nullptr)))
            for (int h = g * sharing; h < (g + 1) * sharing; ++h) {
              if (taps) add_tap_grads<T>(value, p, t, tile, b, h, j, d);
              if (spoiled && from.data != nullptr)
                add_spoiled<T>(value, from, b, h, seeing_queries(p, tile, j, j + 1), d, channels - d, t.vectors,
                               [&](int i) { return at<float>(p.lse, b, h, i) != -infinity<float>(); });
            }
          store_channels(at<T>(to, b, j, g) + d * to.channel, to.channel, channels - d, t.vectors, value);
        });
      };
      if (p.grad_k.data != nullptr)
        write(grad_k, static_cast<float>(p.scale), p.grad_k, p.qk ? p.q : HeadRows{}, false);
      if (p.grad_v.data != nullptr) write(grad_v, 1, p.grad_v, p.grad, p.value_conv.data != nullptr);
    }
    turn.finish();
  }
}

}  // namespace ck::cuda
