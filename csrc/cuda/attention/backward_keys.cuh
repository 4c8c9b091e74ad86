// The backward pass of attention on tensor cores, second part: blocks of keys make d(k), d(v) and the sums for key_rel,
// with the roles of rows and columns exchanged, so that what is summed stays in a warp. Needs delta.
#pragma once

#include "csrc/cuda/attention/gradient_strip.cuh"
#include "csrc/cuda/attention/scores.cuh"
#include "csrc/cuda/attention/taps.cuh"

namespace ck::cuda {

// Blocks: parts, groups, batch rows; a block takes every blocks-th tile of 64 keys. p.key_parts counts warps. kKeys: it
// makes d(k) and the sums for key_rel, kValues: d(v); in wide heads there is a launch for each.
template <class T, int D, bool kKeys, bool kValues>
CK_GLOBAL(kTensorThreads, 2)
void attention_backward_keys(const CK_PARAM AttentionBackward p, const CK_PARAM TensorTables t, int64_t tiles) {
  constexpr int kPitch = D + kVector<T>, kQueries = kGradOthers;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, channels = static_cast<int>(p.channels);
  // Numbers of blocks, heads and batch rows have 32 bits and no sign, so that they take no second register as offsets.
  const unsigned blocks = static_cast<unsigned>(p.key_parts) / kTensorWarps, groups = static_cast<unsigned>(p.groups);
  const int parts = static_cast<int>(blocks), part = static_cast<int>(blockIdx.x % blocks);
  const unsigned unit = blockIdx.x / blocks, b = unit / groups, g = unit % groups;
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
  float* const strips = scalars + 2 * 4 * kQueries;
  const int strip_pitch = static_cast<int>(t.strip_pitch), grad_pitch = static_cast<int>(t.grad_pitch);
  float* const strip = strips + warp * 16 * strip_pitch;
  const int sum_pitch = static_cast<int>(t.channel_pitch) + 4;
  const bool in_ring = kWide<T, D> && p.key_rel.data == nullptr;  // as sums_in_ring() says
  // [16][sum_pitch]
  const auto sums_of = [&](int warp) {
    return (in_ring ? reinterpret_cast<float*>(ring) : strips + kTensorWarps * 16 * (strip_pitch + grad_pitch)) +
           warp * 16 * sum_pitch;
  };
  const auto partial_of = [&](int h) {
    return static_cast<float*>(p.partial_key_rel) +
           ((b * p.heads + h) * p.key_parts + part * kTensorWarps + warp) * W * channels;
  };
  if (kKeys && p.grad_key_rel != nullptr)
    for (unsigned n = 0; n < sharing; ++n)
      for (int64_t e = lane; e < W * channels; e += 32) partial_of(g * sharing + n)[e] = 0;
  const float keep_scale = static_cast<float>(p.keep_scale);
  const int own = warp * 16, row = lane / 4, pair = lane % 4 * 2;

#pragma unroll 1
  for (int n = part; n < tiles; n += parts) {
    const AttentionTile tile(p, n, kGradRows, true, true);
    if (tile.count <= 0) continue;
    const int key_end = tile.first + tile.count;
    const Range queries = seeing_queries(p, tile, max(tile.first, tile.key_begin), key_end);
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kGradRows; r += 32) {
      const int first = tile.first + r;
      const unsigned there = real_keys(p, ask_mask(p, b, first, lane)) & those_in({tile.key_begin, key_end}, first);
      copy_rows<D>(k_rows + r * kPitch, kPitch, p.k, b, g, first, there, channels, D, t.vectors);
      if (kKeys) copy_rows<D>(v_rows + r * kPitch, kPitch, p.v, b, g, first, there, channels, D, t.vectors);
    }
    cp_async_commit();
    const int j0 = tile.first + own;
    const bool works = own < tile.count;
    float grad_k[D / 8][4], grad_v[D / 8][4];
    set_zero(grad_k);
    set_zero(grad_v);
    if (!in_ring)
      for (int e = lane; e < 16 * sum_pitch; e += 32) sums_of(warp)[e] = 0;
    __syncwarp();
    const unsigned real = real_keys(p, ask_mask(p, b, j0, lane));
    const bool all_real = (real & 0xFFFFu) == 0xFFFFu;
    const FarTiles<Side::kKeys, kQueries, 16> far(p, tile, j0);

    bool finite = false;  // what is not finite in the queries' rows is left out
#pragma unroll 1
    while (true) {
#pragma unroll 1
      for (unsigned h = g * sharing; h < (g + 1) * sharing; ++h) {
        const float* const edges =
            t.query_edges == nullptr ? nullptr : t.query_edges + (b * p.heads + h) * 2 * p.queries;
        const Relative<T> rel(p, t, h, lane, edges, strip);
        // Found anew where it is needed, so that no pointers are kept.
        const auto grad_strip = [&] {
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
              .partial = p.grad_key_rel == nullptr ? nullptr : partial_of(opaque(h)),
              .size = channels,
              .bias = nullptr,
              .lane = lane};
        };
        // What key_rel adds outside the window, of this lane's keys.
        float left[2] = {}, right[2] = {}, outer[2][2] = {};
        if (t.key_edges != nullptr)
          for (int half = 0; half < 2; ++half) {
            const int64_t j = min(int64_t{j0} + row + 8 * half, p.keys - 1);
            left[half] = t.key_edges[(b * p.heads + h) * 2 * p.keys + j];
            right[half] = t.key_edges[((b * p.heads + h) * 2 + 1) * p.keys + j];
          }
        if (has_strip && !finite && t.whole_strips) grad_strip().clear();
        const auto copy_queries = [&](int stage, int i0) {
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
          float value = which == 0 ? -infinity<float>() : 0.0f;
          if (i < queries.end) {
            if (which == 0) {
              value = at<float>(p.lse, b, h, i);
            } else if (which == 1) {
              if (scores) value = static_cast<const float*>(p.delta)[(b * p.heads + h) * p.queries + i];
            } else if (edges != nullptr) {
              value = edges[(which - 2) * p.queries + i];
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
            const PairTile<Side::kKeys, kQueries> pairs(p, tile, j0, i0);
            const unsigned blind = __ballot_sync(kAllLanes, of_queries[lane] == infinity<float>());  // see nothing
            ScoreTerms terms;
            if (blind == 0 && far.has(i0, all_real)) {
              terms = far_scores(rel, !p.has_columns() ? -1 : pairs.is_left() ? 0 : 1, left, right);
            } else {
              terms = near_scores(s, rel, pairs, real, left, right, PitchedRows<T>{k_rows + own * kPitch, kPitch},
                                  PitchedRows<T>{r_rows, rel_pitch});
              for (int x = 0; x < kQueries / 8; ++x)
                for (int e = 0; e < 4; ++e) terms.seen &= ~((blind >> (8 * x + pair + e % 2) & 1u) << (4 * x + e));
            }
            const uint32_t kept =
                p.seed == nullptr ? ~0u : draw_fragments(p, static_cast<uint64_t>(*p.seed), b, h, pairs, lane);
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
            if (kValues) multiply_rows<T>(grad_v, s, g_rows, kPitch, all, lane, finite);
            if (scores && p.qk) multiply_rows<T>(grad_k, ds, q_rows, kPitch, all, lane, finite);
            if (has_strip && !finite) scatter_gradients(ds, grad_strip(), pairs, outer);
          }
          store_scalars(1 - stage, coming);
          __syncthreads();
        }
        // Without a query the copies of the keys have not been waited for. The barrier: the next head's first rows may
        // overwrite what others still read.
        cp_async_wait<0>();
        __syncthreads();
        if (has_strip && works && !finite) grad_strip().finish(outer, p.clips());
      }
      if (finite || !__syncthreads_or(spoiled(grad_k) || spoiled(grad_v))) break;
      finite = true;
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
        const int r = v % 16, d = v / 16 * 8, j = j0 + r;
        if (j < tile.key_begin || j >= key_end) continue;
        float value[8];
        const bool there = real_key(p, b, j);
        for (int e = 0; e < 8; ++e) value[e] = there ? sums[r * sum_pitch + d + e] : 0.0f;
        if (taps && there)
          for (unsigned h = g * sharing; h < (g + 1) * sharing; ++h) add_tap_grads<T>(value, p, t, tile, b, h, j, d);
        if (finite && there && from.data != nullptr)
          for (unsigned h = g * sharing; h < (g + 1) * sharing; ++h)
            add_spoiled<T>(value, from, b, h, seeing_queries(p, tile, j, j + 1), d, channels - d, t.vectors,
                           [&](int i) { return at<float>(p.lse, b, h, i) != -infinity<float>(); });
        store_channels(at<T>(to, b, j, g) + d * to.channel, to.channel, channels - d, t.vectors, value);
      }
      __syncwarp();
    };
    const float scale = static_cast<float>(p.scale);
    __syncwarp();
    if (kKeys && p.grad_k.data != nullptr) {
      for (int e = lane; e < 16 * sum_pitch; e += 32) sums[e] = in_ring ? 0.0f : sums[e] * scale;
      __syncwarp();
      add_rows<D>(sums, sum_pitch, grad_k, scale, all, lane);
      write(p.grad_k, p.qk ? p.q : HeadRows{}, false);
    }
    if constexpr (kValues) {
      if (p.grad_v.data == nullptr) continue;
      for (int e = lane; e < 16 * sum_pitch; e += 32) sums[e] = 0;
      __syncwarp();
      add_rows<D>(sums, sum_pitch, grad_v, 1, all, lane);
      write(p.grad_v, p.grad, p.value_conv.data != nullptr);
    }
  }
}

}  // namespace ck::cuda
