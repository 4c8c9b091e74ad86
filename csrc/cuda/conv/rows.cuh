// Filters that differ between positions, channels side by side in memory. A filter is read, and put through softmax and
// dropout, once for all channels of its head that a block has. With renormalize, positions may share their weights:
// then filters differ only where a window is cut off.
#pragma once

#include "csrc/cuda/conv/rows_filters.cuh"

namespace ck::cuda {

// The quad of a block's channels that a lane serves, if a head of R channels has so many lanes. Those that are left
// over take the quads after all heads, which are 0 in shared memory. With heads of 8 channels and their multiples, two
// lanes that differ in the last bit have two quads that do.
CK_DEVICE int quad_of_lane(int64_t R, int lanes, int lane) {
  const int quads = static_cast<int>(min(R / kQuad, int64_t{lanes})), head = lane / lanes, at = lane % lanes;
  return at < quads ? head * quads + at : 32 / lanes * quads + head * (lanes - quads) + at - quads;
}

template <class T, bool kGate, bool kFinish>
CK_DEVICE void rows_outputs(const Forward& p, const Columns& columns, int lanes, int64_t groups) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, K = static_cast<int>(p.taps.taps);
  const int window = static_cast<int>(stream_window(K));
  const int64_t R = p.head_channels();
  const int quad = quad_of_lane(R, lanes, lane);
  Work work(p, groups, columns);
  const int64_t h0 = work.c0 / R;
  char* shared = shared_memory();
  const FilterRows filters(p, lanes, shared);
  constexpr int kSlots = 1 + kFiltersAhead;
  CommonFilters common{filters.row(kSlots * kChunk + warp)};
  shared += rows_table_bytes(K, lanes, kSlots * kChunk + (p.per_position ? 0 : kStreamWarps));
  const InputRing<T, kGate, kAhead> input(shared, window);
  const Quad bias = load_bias(p, work.c0 + quad * kQuad);

  for (Run run; work.next(run);) {
    const Reach reach(p.taps, run.phase);
    const int64_t n0 = run.start * kChunk;
    // Where a warp has the filters of its rows of a chunk.
    const auto own_filters = [&](int64_t chunk) {
      return static_cast<int>(static_cast<uint32_t>(chunk) % kSlots) * kChunk + warp * kRun;
    };
    const auto issue_filters = [&](int64_t chunk) {
      if (!p.per_position || chunk >= run.count) return;
      filters.copy(p, reach.from, run.b, n0 + chunk * kChunk + warp * kRun, h0, own_filters(chunk), kRun);
      cp_async_commit();
    };
    input.for_chunks(p, reach, run, window, work, p.gates<kFinish>(), issue_filters, [&](int64_t k) {
      const int64_t n = n0 + k * kChunk + warp * kRun;
      filters.make(p, reach.from, run.b, n, h0, own_filters(k), common);
      __syncwarp();
      Quad total[kRun] = {};
      const Borders borders(p, p.taps, reach.from, n);
      const float* filter[kRun];
#pragma unroll
      for (int i = 0; i < kRun; ++i) filter[i] = filters.of_lane(own_filters(k) + i, lane);
      walk_within(borders, input.ring, k * kChunk + warp * kRun, K, quad,
                  [&](auto fast, int j, const Quad(&rows)[kRun], int turn) {
#pragma unroll
                    for (int i = 0; i < kRun; ++i) {
                      if (!decltype(fast)::value && !borders.inside(i, j)) continue;
                      const float w = filter[i][j];
                      add_product(total[i], {{w, w, w, w}}, rows[(turn + i) % kRun]);
                    }
                  });
      store_output<T, kFinish>(p, total, bias, reach.from, run.b, n, work, quad);
    });
  }
}

template <class T, bool kGate>
CK_GLOBAL(kStreamThreads, 2)
void rows_forward(const CK_PARAM Forward p, const CK_PARAM Columns columns, int lanes, int64_t groups) {
  rows_outputs<T, kGate, false>(p, columns, lanes, groups);
}

template <class T, bool kGate>
CK_GLOBAL(kStreamThreads, 2)
void rows_forward_finished(const CK_PARAM Forward p, const CK_PARAM Columns columns, int lanes, int64_t groups) {
  rows_outputs<T, kGate, true>(p, columns, lanes, groups);
}

// Adds up, over groups of `width` lanes, a number per row of a run: afterwards values[0 .. count) are the sums of rows
// first, first + 1, ... of the lane's group, and lanes together hold all rows. Every step halves what is left to add
// and the rows that a lane holds, as long as there are rows to share out.
struct RowSums {
  float values[kRun];
  int first, count;

  CK_DEVICE void reduce(int lane, int width) {
    first = 0;
    count = kRun;
    int distance = 1;
#pragma unroll
    for (int half = kRun / 2; half > 0; half /= 2) {
      if (distance >= width) break;
      const bool upper = (lane & distance) != 0;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float give = upper ? values[i] : values[i + half], keep = upper ? values[i + half] : values[i];
        values[i] = keep + __shfl_xor_sync(kAllLanes, give, distance);
      }
      first += upper ? half : 0;
      count = half;
      distance *= 2;
    }
    for (; distance < width; distance *= 2) values[0] += __shfl_xor_sync(kAllLanes, values[0], distance);
  }
};

// d(weight) of rows n .. n + kRun - 1 from their products; of filters that positions share, added to `sum`. It is
// linear in the products: pieces of a head are finished one by one, and rows with the same filter together.
// filter_row(i): the filters of row n + i. By one warp.
template <class Filter>
CK_DEVICE void finish_filters(const Backward& p, const FilterRows& products, const Phase& phase, int64_t b, int64_t n,
                              int64_t h0, int piece, int warp, float* sum, const Filter& filter_row) {
  const bool whole = !p.per_position && whole_windows(p, phase, n);
  float* const own = products.row(warp * kRun);
  if (whole) products.add_up(warp * kRun + 1, kRun - 1, own);
  const int rows = whole ? 1 : kRun;
  products.differentiate(p, phase, b, n, h0, rows, own, filter_row);
  __syncwarp();
  if (p.per_position) {
    const bool cut = p.head_channels() > kLaneRow;
    void* const to = cut ? p.partial_weight : p.grad_weight;
    const Dtype dtype = cut ? Dtype::kFloat32 : p.weight_dtype;
    const int64_t K = p.taps.taps, row = p.heads * K;
    products.for_each_number(p, phase, n, h0, ((cut ? piece * p.batch : 0) + b) * p.time * row, row, K, 1,
                             [&](int, int64_t at, int offset, bool exists) {
                               if (exists) store_as(to, at, dtype, own[offset]);
                             });
  } else {
    int first = 0;
#pragma unroll 1
    while (first < rows && phase.position(n + first) < 0) ++first;
    int end = first;
#pragma unroll 1
    while (end < rows && phase.position(n + end) < p.time) ++end;
    products.add_up(warp * kRun + first, end - first, sum);
  }
}

// d(x), d(gate), d(filters) and d(bias). Filters and d(y) are walked as the inputs see them, z as the outputs do.
template <class T, bool kGate>
CK_GLOBAL(kStreamThreads, 2)
void rows_backward(const CK_PARAM Backward p, const CK_PARAM Columns columns, int lanes) {
  constexpr int kCopies = rows_ahead(sizeof(T), kGate, true);
  const Taps taps = p.taps.transposed();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, K = static_cast<int>(taps.taps);
  const int window = static_cast<int>(stream_window(K));
  const int64_t R = p.head_channels();
  const int quad = quad_of_lane(R, lanes, lane);
  // Rows of the state come before the others; d(y) has none of them.
  const int64_t before = p.state == nullptr ? 0 : taps.span(), ahead = p.state == nullptr ? 0 : K - 1;
  Work work(p, p.groups, columns, before);
  const int64_t h0 = work.c0 / R;
  const bool need_input = p.grad_x.data != nullptr || p.grad_gate.data != nullptr || p.grad_state != nullptr;
  const bool need_weight = p.grad_weight != nullptr, need_bias = p.grad_bias != nullptr;
  const int64_t table_bytes = rows_table_bytes(K, lanes);

  // Filters of the rows that a chunk's windows reach, then products of each warp's own rows; where positions share
  // filters, those of each warp and its sums besides.
  const int slots = window + kFiltersAhead, filter_rows = slots * kChunk;
  const FilterRows filters(p, lanes, shared_memory()), products(p, lanes, shared_memory() + slots * table_bytes);
  char* shared = shared_memory() + (slots + 1) * table_bytes;
  const FilterRows sums(p, lanes, shared);
  CommonFilters common{sums.row(kStreamWarps + warp)};
  if (!p.per_position) {
    shared += rows_table_bytes(K, lanes, 2 * kStreamWarps);
#pragma unroll 1
    for (int at = lane; at < sums.heads * sums.pitch; at += 32) sums.row(warp)[at] = 0;
  }
  const Ring<T> ring{reinterpret_cast<T*>(shared), window + kCopies};
  const InputRing<T, kGate, kCopies> input(reinterpret_cast<char*>(ring.end()), window);
  Quad bias_sum{};

  for (Run run; work.next(run);) {
    const Reach reach(taps, run.phase - before);
    // Outputs of the phase of d(y) read inputs of this one.
    const Reach back(p.taps, reach.to.first);
    const int64_t n0 = run.start * kChunk, m0 = n0 + reach.offset, z0 = n0 - ahead + back.offset;
    const auto issue = [&](int64_t chunk) {
      if (chunk < run.count + window - 1) {
        const int wanted = rows_reached(taps, run.count, chunk);
        copy_gradient(ring.chunk(chunk), p, reach.to, run.b, m0 + chunk * kChunk, wanted, work);
        if (need_weight) input.issue(p, back.to, run.b, z0 + chunk * kChunk, chunk, wanted, work);
      }
      cp_async_commit();
    };
    // Where a row of d(y) has its filters, counted as in its ring.
    const auto filter_at = [&](int64_t row) {
      return static_cast<int>(static_cast<uint32_t>(row) % static_cast<uint32_t>(filter_rows));
    };
    const auto issue_filters = [&](int64_t chunk) {
      if (!p.per_position || chunk >= run.count + window - 1) return;
      const int64_t first = chunk * kChunk + warp * kRun;
      filters.copy(p, reach.to, run.b, m0 + first, h0, filter_at(first),
                   rows_reached(taps, run.count, chunk) - warp * kRun);
      cp_async_commit();
    };
    __syncthreads();  // the run before this one has been read
    for (int64_t k = 1 - window - kCopies; k < run.count; ++k) {
      const int64_t arrived = k + window - 1;
      if (arrived >= 0) {              // before, there is nothing to wait for
        cp_async_wait<kCopies - 1>();  // and for the logits, which were asked for before the last inputs
        __syncthreads();
      }
      if (arrived >= -1) issue_filters(arrived + 1);
      issue(arrived + kCopies);
      if (arrived < 0) continue;
      const int64_t made = arrived * kChunk + warp * kRun;
      filters.make(p, reach.to, run.b, m0 + made, h0, filter_at(made), common);
      if constexpr (kGate)
        if (need_weight) input.gate(arrived, lane, warp, p.gate_activation);
      __syncthreads();
      if (k < 0) continue;
      // A row of d(x), and the row of d(y) at the position of z.
      const int64_t own = k * kChunk + warp * kRun, n = n0 + own, own_output = own - reach.offset - ahead;
      if (need_bias) add_rows(bias_sum, ring, own_output, quad);
      if (need_weight) {
        Quad dy[kRun];
        const T* row = ring.row(own_output);
#pragma unroll
        for (int i = 0; i < kRun; ++i, row = ring.next(row)) dy[i] = load_quad(row + quad * kQuad);
        const Borders borders(p, p.taps, back.from, n - ahead);
        walk_within(borders, input.ring, own, K, quad, [&](auto fast, int j, const Quad(&rows)[kRun], int turn) {
          RowSums product_sums;
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
            Quad product{};
            if (decltype(fast)::value || borders.inside(i, j)) add_product(product, dy[i], rows[(turn + i) % kRun]);
            product_sums.values[i] = (product.v[0] + product.v[1]) + (product.v[2] + product.v[3]);
          }
          product_sums.reduce(lane, products.lanes);
          float* const to = products.of_lane(warp * kRun + product_sums.first, lane) + j;
#pragma unroll
          for (int i = 0; i < kRun; ++i)
            if (i < product_sums.count) to[i * products.heads * products.pitch] = product_sums.values[i];
        });
        __syncwarp();
        finish_filters(p, products, back.from, run.b, n - ahead, h0, work.piece, warp, sums.row(warp),
                       [&](int i) { return filters.row(filter_at(own_output + i)); });
      }
      if (!need_input) continue;
      Quad dz[kRun] = {};
      const Borders borders(p, taps, reach.from, n);
      // The filters of the rows of the window, as these are numbered, at the tap that meets them.
      const float* filter[kRun];
      int at = filter_at(own);
      const auto next_filter = [&](int j) {
        const float* const found = filters.of_lane(at, lane) + K - 1 - j;
        at = at + 1 < filter_rows ? at + 1 : 0;
        return found;
      };
#pragma unroll
      for (int i = 0; i < kRun - 1; ++i) filter[i] = next_filter(0);
      walk_within(borders, ring, own, K, quad, [&](auto fast, int j, const Quad(&rows)[kRun], int turn) {
        filter[(turn + kRun - 1) % kRun] = next_filter(j);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const float*& from = filter[(turn + i) % kRun];
          if (decltype(fast)::value || borders.inside(i, j)) {
            const float w = *from;
            add_product(dz[i], {{w, w, w, w}}, rows[(turn + i) % kRun]);
          }
          --from;
        }
        if constexpr (!decltype(fast)::value)
#pragma unroll
          for (int i = 0; i < kRun - 1; ++i) filter[i] = filter[i + 1];
      });
      mask_rows(p, dz, reach.from, run.b, n);
      if constexpr (kGate) {
        Quad dgate[kRun] = {};
        with_activation(p.gate_activation, [&](Activation act) {
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
            const int64_t s = reach.from.position(n + i), c = work.c0 + quad * kQuad;
            if (s >= p.time || quad * kQuad >= work.channels || masked(p, run.b, s)) continue;
            const auto load = [&](const Rows& rows) {
              return load_quad(cuda::at<const T>(rows, run.b, s, c), kQuad, p.vector_bytes);
            };
            gate_gradient<T>(dz[i].v, dgate[i].v, load(p.x).v, load(p.gate).v, act);
          }
        });
        if (p.grad_gate.data != nullptr) store_rows<T>(p, p.grad_gate, dgate, reach.from, run.b, n, work, quad);
      }
      if (p.grad_x.data != nullptr) store_rows<T>(p, p.grad_x, dz, reach.from, run.b, n, work, quad);
      if (p.grad_state != nullptr && reach.from.position(n) < 0)
        store_state<T>(p, dz, reach.from, run.b, n, work, quad);
    }
  }
  const int64_t partial = work.owner * p.groups + work.group;
  if (need_weight && !p.per_position) {
    __syncthreads();
    // partial_weight: the warps' sums, added in order.
#pragma unroll 1
    for (int head = 0; head < sums.heads && h0 + head < p.heads; ++head)
#pragma unroll 1
      for (int j = threadIdx.x; j < K; j += kStreamThreads) {
        float total = 0;
        for (int w = 0; w < kStreamWarps; ++w) total += sums.row(w)[head * sums.pitch + j];
        const int64_t row = (partial * p.heads + h0 + head) * columns.pieces + work.piece;
        static_cast<float*>(p.partial_weight)[row * K + j] = total;
      }
  }
  if (need_bias) store_bias_sums(p, bias_sum, reinterpret_cast<float*>(shared), partial, work, quad);
}

}  // namespace ck::cuda
