// The backward pass of attention on tensor cores, second part: blocks of keys make d(k), d(v) and the sums for key_rel,
// with the roles of rows and columns exchanged, so that what is summed stays in a warp. Needs delta.
#pragma once

#include "csrc/cuda/attention/gradient_strip.cuh"
#include "csrc/cuda/attention/scores.cuh"
#include "csrc/cuda/attention/taps.cuh"
#include "csrc/cuda/attention/warp_tile.cuh"

namespace ck::cuda {

// Blocks: parts, groups, batch rows; a block takes every blocks-th tile of 64 keys. p.key_parts counts warps. kKeys: it
// makes d(k) and the sums for key_rel, kValues: d(v); in wide heads there is a launch for each.
template <class T, int D, bool kKeys, bool kValues>
CK_GLOBAL(kTensorThreads, 2)
void attention_backward_keys(const CK_PARAM AttentionBackward p, const CK_PARAM TensorTables t, int64_t tiles) {
  constexpr int kPitch = D + kVector<T>, kQueries = kGradOthers;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, channels = static_cast<int>(p.channels);
  const auto blocks = [&] { return opaque(static_cast<int>(p.key_parts)) / kTensorWarps; };
  const unsigned sharing = static_cast<unsigned>(p.sharing());
  const int64_t W = p.window();
  const bool low_rank = p.rel_query.data != nullptr, scores = kKeys && p.needs_keys();
  const bool has_strip = p.key_rel.data != nullptr && scores, all = t.channel_pitch == D;
  const int padded = static_cast<int>(t.channel_pitch);
  const int rel_pitch = low_rank ? static_cast<int>(t.rank_pitch) + kVector<T> : kPitch;

  T* const k_rows = reinterpret_cast<T*>(shared_memory());
  T* const v_rows = k_rows + kGradRows * kPitch;
  T* const ring = v_rows + kGradRows * kPitch;
  const int stage_size = kQueries * (2 * kPitch + (low_rank ? rel_pitch : 0));
  float* const scalars = reinterpret_cast<float*>(ring + 2 * stage_size);  // [stage][lse, delta, edges][query]
  WarpTile<Side::kKeys>& keys = reinterpret_cast<WarpTile<Side::kKeys>*>(scalars + 2 * 4 * kQueries)[warp];
  const AttentionTile& tile = keys.tile;
  const Range& queries = keys.others;
  float* const strips = scalars + 2 * 4 * kQueries + kTensorWarps * kWarpTileBytes / 4;
  const int strip_pitch = static_cast<int>(t.strip_pitch), grad_pitch = static_cast<int>(t.grad_pitch);
  const int sum_pitch = static_cast<int>(t.channel_pitch) + 4;
  const bool in_ring = !has_strip || t.whole_strips;  // as sums_in_ring() says
  // [16][sum_pitch]
  const auto sums_of = [&](int warp) {
    return (in_ring ? reinterpret_cast<float*>(ring) : strips + kTensorWarps * 16 * (strip_pitch + grad_pitch)) +
           warp * 16 * sum_pitch;
  };
  const auto clear_sums = [&] {
    float* const sums = sums_of(opaque(warp));
    __syncwarp();
#pragma unroll 1
    for (int e = opaque(lane); e < 16 * sum_pitch; e += 32) sums[e] = 0;
    __syncwarp();
  };
  const auto partial_of = [&](int h) {
    return static_cast<float*>(p.partial_key_rel) +
           ((keys.b * p.heads + h) * p.key_parts + keys.part * kTensorWarps + warp) * W * channels;
  };
  const auto find_keys = [&](int n) {
    __syncwarp();
    if (lane == 0) keys = WarpTile<Side::kKeys>(p, n, static_cast<unsigned>(blocks()), warp * 16);
    __syncwarp();
  };
  find_keys(blockIdx.x % blocks());
  if (kKeys && p.grad_key_rel != nullptr)
    for (unsigned n = 0; n < sharing; ++n)
      for (int64_t e = lane; e < W * channels; e += 32) partial_of(keys.g * sharing + n)[e] = 0;
  const float keep_scale = static_cast<float>(p.keep_scale);
  const int own = warp * 16, row = lane / 4, pair = lane % 4 * 2;

#pragma unroll 1
  for (; keys.number < tiles; find_keys(keys.number + blocks())) {
    if (tile.count <= 0) continue;
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kGradRows; r += 32) {
      const int first = tile.first + r;
      const unsigned there =
          real_keys(p, ask_mask(p, keys.b, first, lane)) & those_in({tile.key_begin, tile.end()}, first);
      copy_rows<D>(k_rows + r * kPitch, kPitch, p.k, keys.b, keys.g, first, there, channels, D, t.vectors);
      if (kKeys) copy_rows<D>(v_rows + r * kPitch, kPitch, p.v, keys.b, keys.g, first, there, channels, D, t.vectors);
    }
    cp_async_commit();
    const unsigned left_by_mask = real_keys(p, ask_mask(p, keys.b, keys.own, lane));
    if (lane == 0) {
      keys.real = left_by_mask;
      if ((left_by_mask & 0xFFFFu) != 0xFFFFu) keys.leave_far();
    }
    const bool works = own < tile.count;
    float grad_k[D / 8][4], grad_v[D / 8][4];
    set_zero(grad_k);
    set_zero(grad_v);
    __syncwarp();

#pragma unroll 1
    while (true) {
#pragma unroll 1
      for (unsigned h = keys.g * sharing; h < (keys.g + 1) * sharing; ++h) {
        // Found anew where they are needed, so that no pointers are kept.
        const auto edges_of = [&](int side) { return t.query_edges + ((keys.b * p.heads + h) * 2 + side) * p.queries; };
        const auto relative = [&] {
          return Relative<T>(p, t, h, lane, t.query_edges == nullptr ? nullptr : edges_of(0),
                             strips + opaque(threadIdx.x / 32) * 16 * strip_pitch);
        };
        const auto grad_strip = [&] {
          const Relative<T> rel = relative();
          const int warp = opaque(threadIdx.x / 32);
          return GradientStrip<T, PitchedRows<T>, SharedSums>{
              .strip = strips + 16 * (kTensorWarps * strip_pitch + warp * grad_pitch),
              .pitch = grad_pitch,
              .whole = t.whole_strips,
              .rows = {k_rows + own * kPitch, kPitch},
              .table = rel.key_rel(),
              .terms = t.key_terms,
              .W = rel.W,
              .table_pitch = t.channel_pitch,
              .wants_sums = true,
              .sums = {sums_of(warp), sum_pitch},
              .partial = p.grad_key_rel == nullptr || keys.finite ? nullptr : partial_of(opaque(h)),  // the first time
              .size = channels,
              .bias = nullptr,
              .lane = lane};
        };
        // Adds what key_rel adds left (0) or right (1) of the window to this lane's keys.
        const auto add_edges = [&](float (&added)[2], int side) {
          if (t.key_edges == nullptr) return;
          for (int half = 0; half < 2; ++half)
            added[half] = t.key_edges[((keys.b * p.heads + h) * 2 + side) * p.keys +
                                      min(int64_t{keys.own} + row + 8 * half, p.keys - 1)];
        };
        float outer[2][2] = {};
        if (has_strip && t.whole_strips) grad_strip().clear();
        if (has_strip && !t.whole_strips) clear_sums();
        const auto copy_queries = [&](int stage, int i0) {
          const unsigned b = keys.b;
          T* const to = ring + stage * stage_size;
          const unsigned there = those_in(queries, i0);
          copy_rows<D>(to, kPitch, p.q, b, h, i0, there, channels, padded, t.vectors);
          copy_rows<D>(to + kQueries * kPitch, kPitch, p.grad, b, h, i0, there, channels, padded, t.vectors);
          if (low_rank)
            copy_rows(to + 2 * kQueries * kPitch, rel_pitch, p.rel_query, b, h, i0, there, static_cast<int>(p.rank),
                      static_cast<int>(t.rank_pitch), t.rank_vectors);
        };
        // lse, delta and edges of the queries from i0 on; a warp loads one of these four.
        const auto load_scalars = [&](int i0) {
          const int which = warp, i = i0 + lane;
          const unsigned b = keys.b;
          float value = which == 0 ? -infinity<float>() : 0.0f;
          if (i < queries.end) {
            if (which == 0) {
              value = at<float>(p.lse, b, h, i);
            } else if (which == 1) {
              if (scores) value = static_cast<const float*>(p.delta)[(b * p.heads + h) * p.queries + i];
            } else if (t.query_edges != nullptr) {
              value = edges_of(which - 2)[i];
            }
          }
          return value;
        };
        // Only here is the number used, so that no warp waits for it before.
        const auto store_scalars = [&](int stage, float value) {
          // A query that sees nothing has no probabilities.
          if (warp == 0) value = value == -infinity<float>() ? infinity<float>() : value * kLog2e;
          scalars[(stage * 4 + warp) * kQueries + lane] = value;
        };
        if (queries.first < queries.end) {
          copy_queries(0, queries.first);
          store_scalars(0, load_scalars(queries.first));
        }
        cp_async_commit();
        int stage = 0;
#pragma unroll 1
        for (int i0 = queries.first; i0 < queries.end; i0 += kQueries, stage = 1 - stage) {
          if (i0 + kQueries < queries.end) copy_queries(1 - stage, i0 + kQueries);
          cp_async_commit();
          const float coming = load_scalars(i0 + kQueries);  // used when this tile is done
          cp_async_wait<1>();
          __syncthreads();
          const T* const q_rows = ring + stage * stage_size;
          const T* const g_rows = q_rows + kQueries * kPitch;
          const T* const r_rows = low_rank ? g_rows + kQueries * kPitch : q_rows;
          const float* const of_queries = scalars + stage * 4 * kQueries;
          if (works) {
            float s[kQueries / 8][4] = {}, ds[kQueries / 8][4] = {};
            if (p.qk) multiply_pairs<T, D, kQueries>(s, k_rows + own * kPitch, q_rows, kPitch, all, lane);
            const auto multiply_values = [&] {
              if (scores) multiply_pairs<T, D, kQueries>(ds, v_rows + own * kPitch, g_rows, kPitch, all, lane);
            };
            if (!kWide<T, D>) multiply_values();
            const PairTile<Side::kKeys, kQueries> pairs(p, tile, keys.own, i0);
            const unsigned blind = __ballot_sync(kAllLanes, of_queries[lane] == infinity<float>());  // see nothing
            ScoreTerms terms{t.score_factor, {}, -1, kEveryPair};
            if (blind == 0 && keys.far.has(i0, true)) {
              if (p.has_columns()) {
                terms.side = pairs.is_left() ? 0 : 1;
                add_edges(terms.added, terms.side);
              }
            } else {
              float left[2] = {}, right[2] = {};
              add_edges(left, 0);
              add_edges(right, 1);
              terms = near_scores(s, relative(), pairs, keys.real, left, right,
                                  PitchedRows<T>{k_rows + own * kPitch, kPitch}, PitchedRows<T>{r_rows, rel_pitch});
              for (int x = 0; x < kQueries / 8; ++x)
                for (int e = 0; e < 4; ++e) terms.seen &= ~((blind >> (8 * x + pair + e % 2) & 1u) << (4 * x + e));
            }
            const uint32_t kept =
                p.seed == nullptr ? ~0u : draw_fragments(p, static_cast<uint64_t>(*p.seed), keys.b, h, pairs, lane);
            // So late in wide heads, where registers are few.
            if (kWide<T, D>) multiply_values();
#pragma unroll
            for (int x = 0; x < kQueries / 8; ++x) {
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                const float* const query = of_queries + 8 * x + pair + e % 2;
                const float constant =
                    (terms.side < 0 ? 0.0f : query[(2 + terms.side) * kQueries]) + terms.added[e / 2] - query[0];
                const float probable = fast_exp2(s[x][e] * terms.factor + constant);
                const float keep = (kept >> (4 * x + e) & 1u) != 0 ? keep_scale : 0.0f;
                ds[x][e] = probable * (ds[x][e] * keep - query[kQueries]);
                s[x][e] = probable * keep;
              }
            }
            select_seen(s, terms.seen);
            select_seen(ds, terms.seen);
            if (kValues) multiply_rows<T>(grad_v, s, g_rows, kPitch, all, lane, keys.finite);
            if (scores && p.qk) multiply_rows<T>(grad_k, ds, q_rows, kPitch, all, lane, keys.finite);
            if (has_strip) scatter_gradients(ds, grad_strip(), pairs, outer);
          }
          store_scalars(1 - stage, coming);
          __syncthreads();
        }
        // Without a query the copies of the keys have not been waited for. The barrier: the next head's first rows may
        // overwrite what others still read.
        cp_async_wait<0>();
        __syncthreads();
        if (has_strip) {
          if (works) {
            if (in_ring) clear_sums();
            grad_strip().finish(outer, p.clips());
            take_rows<D>(grad_k, sums_of(opaque(warp)), sum_pitch, all, lane);
          }
          __syncthreads();
        }
      }
      if (keys.finite || !__syncthreads_or(spoiled(grad_k) || spoiled(grad_v))) break;
      if (lane == 0) keys.finite = true;
      __syncwarp();
      set_zero(grad_k);
      set_zero(grad_v);
    }
    if (!works) continue;
    float* const sums = sums_of(opaque(warp));
    // Of rows `from` of the queries.
    const auto write = [&](const HeadRows& to, const HeadRows& from, bool taps) {
      __syncwarp();
#pragma unroll 1
      for (int v = lane; v < 16 * ((channels + 7) / 8); v += 32) {
        const int r = v % 16, d = v / 16 * 8, j = keys.own + r;
        const unsigned b = keys.b, g = keys.g;
        if (j < tile.key_begin || j >= tile.end()) continue;
        float value[8];
        const bool there = real_key(p, b, j);
        for (int e = 0; e < 8; ++e) value[e] = there ? sums[r * sum_pitch + d + e] : 0.0f;
        if (taps && there)
          for (unsigned h = g * sharing; h < (g + 1) * sharing; ++h) add_tap_grads<T>(value, p, t, tile, b, h, j, d);
        if (keys.finite && there && from.data != nullptr)
          for (unsigned h = g * sharing; h < (g + 1) * sharing; ++h)
            add_spoiled<T>(value, from, b, h, seeing_queries(p, tile, j, j + 1), d, channels - d, t.vectors,
                           [&](int i) { return at<float>(p.lse, b, h, i) != -infinity<float>(); });
        store_channels(at<T>(to, b, j, g) + d * to.channel, to.channel, channels - d, t.vectors, value);
      }
      __syncwarp();
    };
    const float scale = static_cast<float>(p.scale);
    if (kKeys && p.grad_k.data != nullptr) {
      clear_sums();
      add_rows<D>(sums, sum_pitch, grad_k, scale, all, lane);
      write(p.grad_k, p.qk ? p.q : HeadRows{}, false);
    }
    if constexpr (kValues) {
      if (p.grad_v.data == nullptr) continue;
      clear_sums();
      add_rows<D>(sums, sum_pitch, grad_v, 1, all, lane);
      write(p.grad_v, p.grad, p.value_conv.data != nullptr);
    }
  }
}

}  // namespace ck::cuda
