// The backward pass of the stream family: d(x), d(gate), d(filters) and d(bias) from one walk over x and d(y).
#pragma once

#include "csrc/cuda/conv/stream.cuh"

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

// Blocks as in stream_forward. The ring holds d(y), whose rows the inputs reach through the transposed taps; the
// block's own rows of x and of the gate pass through shared memory besides.
template <class T, bool kShared, bool kFew>
CK_GLOBAL(kStreamThreads, 2)
void stream_backward(const CK_PARAM Backward p) {
  using Sums = TapSums<kShared>;
  const Taps taps = p.taps.transposed();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, K = static_cast<int>(taps.taps);
  const int window = static_cast<int>(stream_window(K));
  // Rows of the state come before the others; d(y) has none of them.
  const int64_t before = p.state == nullptr ? 0 : taps.span(), ahead = p.state == nullptr ? 0 : K - 1;
  Work work(p, p.groups, Columns(p.channels), before);
  const bool need_input = p.grad_x.data != nullptr || p.grad_gate.data != nullptr || p.grad_state != nullptr;
  const bool need_weight = p.grad_weight != nullptr, need_bias = p.grad_bias != nullptr;
  const bool gated = p.gate.data != nullptr;

  char* shared = shared_memory();
  const FilterTable<kShared> table{reinterpret_cast<float*>(shared)};
  shared += stream_table_bytes(K, kShared);
  float* const far = reinterpret_cast<float*>(shared) + threadIdx.x * Sums::kWidth;  // sums in shared memory
  constexpr int kFar = kStreamThreads * Sums::kWidth;                                // from one tap to the next
  float few[kFew ? kFewTaps : 1][Sums::kWidth] = {};
  if (!kFew) {
    shared += stream_sum_bytes(K, kShared);
#pragma unroll 1
    for (int j = 0; j < K; ++j)
      for (int e = 0; e < Sums::kWidth; ++e) far[j * kFar + e] = 0;
  }
  const Ring<T> ring{reinterpret_cast<T*>(shared), window + kAhead};
  // The rows of x and the gate are read once.
  const Ring<T> own_x{ring.end(), 1 + kAhead}, own_gate{own_x.end(), 1 + kAhead};
  Quad bias_sum{};

  table.fill(p, work.owner, work.c0);
  for (Run run; work.next(run);) {
    const Reach reach(taps, run.phase - before);
    const int64_t n0 = run.start * kChunk, m0 = n0 + reach.offset;
    const auto issue = [&](int64_t chunk, int64_t own) {
      if (chunk < run.count + window - 1)
        copy_gradient(ring.chunk(chunk), p, reach.to, run.b, m0 + chunk * kChunk, rows_reached(taps, run.count, chunk),
                      work);
      if (own >= 0 && own < run.count && (need_weight || gated))
        copy_inputs(own_x.chunk(own), own_gate.chunk(own), gated, p, reach.from, run.b, n0 + own * kChunk, kChunk,
                    work);
      cp_async_commit();
    };
    __syncthreads();  // the run before this one has been read
    for (int64_t k = 1 - window - kAhead; k < run.count; ++k) {
      if (k >= 0) {  // before, there is nothing to wait for
        cp_async_wait<kAhead - 1>();
        __syncthreads();
      }
      issue(k + window + kAhead - 1, k + kAhead);
      if (k < 0) continue;
      const int64_t n = n0 + k * kChunk + warp * kRun;
      const T* const x = own_x.chunk(k) + warp * kRun * kLaneRow + lane * kQuad;
      const T* const gate = own_gate.chunk(k) + warp * kRun * kLaneRow + lane * kQuad;
      Quad dz[kRun] = {}, z[kRun] = {};
      if (need_weight) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) z[i] = load_quad(x + i * kLaneRow);
        if (gated)
          with_activation(p.gate_activation, [&](Activation act) {
#pragma unroll
            for (int i = 0; i < kRun; ++i) apply_gate<T>(z[i].v, load_quad(gate + i * kLaneRow).v, act);
          });
      }
      const Borders borders(p, taps, reach.from, n);
      walk_within(borders, ring, k * kChunk + warp * kRun, K, lane,
                  [&](auto fast, int j, const Quad(&rows)[kRun], int turn) {
                    const Quad w = table.at(K - 1 - j, lane);
                    Quad products{};
#pragma unroll
                    for (int i = 0; i < kRun; ++i) {
                      if (!decltype(fast)::value && !borders.inside(i, j)) continue;
                      const Quad& dy = rows[(turn + i) % kRun];
                      add_product(dz[i], w, dy);
                      add_product(products, z[i], dy);
                    }
                    if constexpr (!kFew) {
                      Sums::add(far + j * kFar, products);
                    } else if constexpr (decltype(fast)::value) {
                      Sums::add(few[turn], products);
                    } else {
#pragma unroll
                      for (int tap = 0; tap < kFewTaps; ++tap)  // registers have no index
                        if (tap == j) Sums::add(few[tap], products);
                    }
                  });
      // Row n - ahead of the phase of d(y). Chunks cover the longest phase, so that each of its rows is added once.
      if (need_bias) add_rows(bias_sum, ring, k * kChunk + warp * kRun - reach.offset - ahead, lane);
      if (!need_input) continue;
      mask_rows(p, dz, reach.from, run.b, n);
      if (gated) {
        Quad dgate[kRun];
        with_activation(p.gate_activation, [&](Activation act) {
#pragma unroll
          for (int i = 0; i < kRun; ++i)
            gate_gradient<T>(dz[i].v, dgate[i].v, load_quad(x + i * kLaneRow).v, load_quad(gate + i * kLaneRow).v, act);
        });
        if (p.grad_gate.data != nullptr) store_rows<T>(p, p.grad_gate, dgate, reach.from, run.b, n, work, lane);
      }
      if (p.grad_x.data != nullptr) store_rows<T>(p, p.grad_x, dz, reach.from, run.b, n, work, lane);
      if (p.grad_state != nullptr && reach.from.position(n) < 0)
        store_state<T>(p, dz, reach.from, run.b, n, work, lane);
    }
  }

  const int64_t partial = work.owner * p.groups + work.group;
  if (need_weight) {
    float* const sums = reinterpret_cast<float*>(shared_memory() + stream_table_bytes(K, kShared));
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
      for (int e = 0; e < Sums::kWidth; ++e) {
        if (quad * kQuad + e >= work.channels) break;
        float total = 0;
        for (int w = 0; w < kStreamWarps; ++w) total += sums[j * kFar + (w * 32 + quad) * Sums::kWidth + e];
        const int64_t column = (work.c0 + quad * kQuad) / (kShared ? kQuad : 1) + e;
        static_cast<float*>(p.partial_weight)[(partial * columns + column) * K + K - 1 - j] = total;
      }
    }
  }
  if (need_bias) store_bias_sums(p, bias_sum, reinterpret_cast<float*>(shared), partial, work, lane);
}

}  // namespace ck::cuda
