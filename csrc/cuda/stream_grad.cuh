// The backward pass of the stream family: d(x), d(gate), d(filters) and d(bias) from one walk over x and d(y).
#pragma once

#include "stream.cuh"

namespace ck::cuda {

// Sums for d(filters) of a thread: a number per tap, and per channel unless the quad shares a filter.
template <bool kShared>
struct TapSums {
  static constexpr int kWidth = kShared ? 1 : kQuad;

  // products[e]: what channel e adds to a tap.
  static CK_DEVICE void add(float* sum, const Quad& products) {
    if constexpr (kShared)
      *sum += (products.v[0] + products.v[1]) + (products.v[2] + products.v[3]);
    else
      for (int e = 0; e < kQuad; ++e) sum[e] += products.v[e];
  }
};

// Blocks as in stream_forward. Rows n of inputs see rows of d(y) through the transposed relation.
template <class T, bool kShared, bool kGate, bool kFew>
CK_GLOBAL(kStreamThreads, 2)
void stream_backward(const CK_PARAM Backward p) {
  using Sums = TapSums<kShared>;
  const StreamShape shape(p);
  const Taps taps = p.taps.transposed();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, K = static_cast<int>(taps.taps);
  const int window = shape.window_chunks, slots = window + kAhead;
  constexpr int kOwn = 1 + kAhead;  // slots of the rings of x and the gate, whose rows are read once
  const int64_t c0 = blockIdx.x % shape.channel_blocks * kLaneRow, channels = least(p.channels - c0, int64_t{kLaneRow});
  const int64_t group = blockIdx.x / shape.channel_blocks % p.groups;
  const int64_t owner = blockIdx.x / shape.channel_blocks / p.groups;
  const int64_t all = shape.chunks(p), each = ceil_div(all, p.groups), last = least((group + 1) * each, all);
  const bool need_input = p.grad_x.data != nullptr || p.grad_gate.data != nullptr;
  const bool need_weight = p.grad_weight != nullptr, need_bias = p.grad_bias != nullptr;

  char* room = shared_memory();
  const FilterTable<kShared> table{reinterpret_cast<float*>(room)};
  room += stream_table_bytes(K, kShared);
  float* const far = reinterpret_cast<float*>(room) + threadIdx.x * Sums::kWidth;  // sums in shared memory
  constexpr int kFar = kStreamThreads * Sums::kWidth;                              // from one tap to the next
  float few[kFew ? kFewTaps : 1][Sums::kWidth] = {};
  if (!kFew) {
    room += stream_sum_bytes(K, kShared);
    for (int j = 0; j < K; ++j)
      for (int e = 0; e < Sums::kWidth; ++e) far[j * kFar + e] = 0;
  }
  const Ring<T> ring{reinterpret_cast<T*>(room), slots * kChunk};
  T* const own_x = ring.base + int64_t{slots} * kChunk * kLaneRow;
  T* const own_gate = own_x + kOwn * kChunk * kLaneRow;
  Quad bias_sum{};

  table.fill(p, owner, c0);
  for (int64_t unit = group * each; unit < last;) {
    const int64_t run = unit / shape.chunks_of_phase, start = unit % shape.chunks_of_phase;
    const int64_t b = owner + run / taps.dilation, count = least(shape.chunks_of_phase - start, last - unit);
    unit += count;
    const Reach reach(taps, run % taps.dilation);
    const int64_t n0 = start * kChunk, m0 = n0 + reach.offset;
    const auto issue = [&](int64_t chunk, int64_t own) {
      if (chunk < count + window - 1)
        copy_chunk(ring.base + chunk % slots * kChunk * kLaneRow, reach.to, m0 + chunk * kChunk, c0,
                   [&](T* to, int64_t s, int64_t c) { stage_gradient(to, p, b, s, c); });
      if (own < count && (need_weight || kGate)) {
        const int64_t room_of = own % kOwn * kChunk * kLaneRow;
        copy_chunk(own_x + room_of, reach.from, n0 + own * kChunk, c0,
                   [&](T* to, int64_t s, int64_t c) { stage_input(to, p, p.x, b, s, c); });
        if (kGate)
          copy_chunk(own_gate + room_of, reach.from, n0 + own * kChunk, c0,
                     [&](T* to, int64_t s, int64_t c) { stage_input(to, p, p.gate, b, s, c); });
      }
      cp_async_commit();
    };
    __syncthreads();  // the run before this one has been read
    for (int chunk = 0; chunk < window + kAhead - 1; ++chunk) issue(chunk, chunk < kAhead ? chunk : count);
    for (int64_t k = 0; k < count; ++k) {
      cp_async_wait<kAhead - 1>();
      __syncthreads();
      issue(k + window + kAhead - 1, k + kAhead);
      const int64_t n = n0 + k * kChunk + warp * kRun;
      const int64_t own = (k % kOwn * kChunk + warp * kRun) * kLaneRow + lane * kQuad;
      Quad dz[kRun] = {}, z[kRun] = {};
      if (need_weight)
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          z[i] = load_quad(own_x + own + i * kLaneRow);
          if constexpr (kGate) {
            const Quad gate = load_quad(own_gate + own + i * kLaneRow);
            for (int e = 0; e < kQuad; ++e) z[i].v[e] *= sigmoid(gate.v[e]);
          }
        }
      const Borders borders(p, reach, n, K);
      const auto add = [&](auto checked) {
        walk(ring, k * kChunk + warp * kRun, K, lane, [&](int j, const Quad(&rows)[kRun], int turn) {
          const Quad w = table.at(K - 1 - j, lane);
          Quad products{};
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
            if (decltype(checked)::value && !borders.inside(i, reach.to.position(n + reach.offset + j + i))) continue;
            const Quad& dy = rows[(turn + i) % kRun];
#pragma unroll
            for (int e = 0; e < kQuad; ++e) {
              dz[i].v[e] += w.v[e] * dy.v[e];
              products.v[e] += z[i].v[e] * dy.v[e];
            }
          }
          if constexpr (kFew)
            Sums::add(few[turn], products);
          else
            Sums::add(far + j * kFar, products);
        });
      };
      if (borders.whole)
        add(Bool<false>{});
      else
        add(Bool<true>{});
      if (need_bias)
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          // Row n of the phase of d(y): with as many rows as the phase of x, or one more, all are met.
          const Quad dy = load_quad(ring.row(k * kChunk + warp * kRun + i - reach.offset) + lane * kQuad);
          for (int e = 0; e < kQuad; ++e) bias_sum.v[e] += dy.v[e];
        }
      if (!need_input) continue;
      const auto store = [&](const Rows& to) {
        store_run(
            dz, lane, channels,
            [&](int i) {
              const int64_t s = reach.from.position(n + i);
              return s < p.time ? at<T>(to, b, s, c0) : nullptr;
            },
            static_cast<T*>(nullptr));
      };
      if (p.mask != nullptr)
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const int64_t s = reach.from.position(n + i);
          if (s < p.time && masked(p, b, s)) dz[i] = {};
        }
      if constexpr (kGate) {
        Quad dgate[kRun];
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const Quad x = load_quad(own_x + own + i * kLaneRow), gate = load_quad(own_gate + own + i * kLaneRow);
          for (int e = 0; e < kQuad; ++e) {
            const float open = sigmoid(gate.v[e]);
            dgate[i].v[e] = dz[i].v[e] * x.v[e] * open * (1 - open);
            dz[i].v[e] *= open;
          }
        }
        if (p.grad_x.data != nullptr) store(p.grad_x);
        if (p.grad_gate.data != nullptr) {
#pragma unroll
          for (int i = 0; i < kRun; ++i) dz[i] = dgate[i];
          store(p.grad_gate);
        }
      } else {
        store(p.grad_x);
      }
    }
  }

  const int64_t partial = owner * p.groups + group;
  float* const sums = kFew ? reinterpret_cast<float*>(room)
                           : reinterpret_cast<float*>(shared_memory() + stream_table_bytes(K, kShared));
  if (need_weight) {
    __syncthreads();
    if constexpr (kFew)
#pragma unroll
      for (int turn = 0; turn < kFewTaps; ++turn)
        if (turn < K)
          for (int e = 0; e < Sums::kWidth; ++e) sums[turn * kFar + threadIdx.x * Sums::kWidth + e] = few[turn][e];
    __syncthreads();
    const int64_t columns = p.channels / (kShared ? kQuad : 1);
    for (int i = threadIdx.x; i < K * 32; i += kStreamThreads) {
      const int j = i / 32, quad = i % 32;
      if (quad * kQuad >= channels) continue;
      for (int e = 0; e < Sums::kWidth; ++e) {
        float total = 0;
        for (int w = 0; w < kStreamWarps; ++w) total += sums[j * kFar + (w * 32 + quad) * Sums::kWidth + e];
        const int64_t column = (c0 + quad * kQuad) / (kShared ? kQuad : 1) + e;
        if (!kShared && quad * kQuad + e >= channels) continue;
        static_cast<float*>(p.partial_weight)[(partial * columns + column) * K + K - 1 - j] = total;
      }
    }
  }
  if (need_bias) {
    float* const totals = reinterpret_cast<float*>(room);
    __syncthreads();
    store_quad(totals + threadIdx.x * kQuad, bias_sum);
    __syncthreads();
    if (threadIdx.x < channels) {
      float total = 0;
      for (int w = 0; w < kStreamWarps; ++w) total += totals[w * kLaneRow + threadIdx.x];
      static_cast<float*>(p.partial_bias)[partial * p.channels + c0 + threadIdx.x] = total;
    }
  }
}

}  // namespace ck::cuda
