// Filters that differ between positions, channels side by side in memory. A filter is read, and put through softmax and
// dropout, once for all channels of its head that a block has. With renormalize, positions may share their weights:
// then filters differ only where a window is cut off.
#pragma once

#include "csrc/cuda/conv/walk.cuh"

namespace ck::cuda {

// The quad of a block's channels that a lane serves, if a head of R channels has so many lanes. Those that are left
// over take the quads after all heads, which are 0 in shared memory. With heads of 8 channels and their multiples, two
// lanes that differ in the last bit have two quads that do.
CK_DEVICE int quad_of_lane(int64_t R, int lanes, int lane) {
  const int quads = static_cast<int>(min(R / kQuad, int64_t{lanes})), head = lane / lanes, at = lane % lanes;
  return at < quads ? head * quads + at : 32 / lanes * quads + head * (lanes - quads) + at - quads;
}

// Whether the windows of rows n .. n + kRun - 1 of a phase, all of which exist, lie within a sequence as a whole.
CK_DEVICE bool whole_windows(const Problem& p, const Phase& phase, int64_t n) {
  const int64_t top = phase.position(n), end = phase.position(n + kRun - 1);
  if (top < 0 || end >= p.time) return false;
  const Sequence sequence = sequence_of(p, top);
  return end < sequence.end && p.taps.source(top, 0) >= sequence.first &&
         p.taps.source(end, p.taps.taps - 1) < sequence.end;
}

// Filters that positions share, kept by a warp from the first whole windows that it computes.
struct CommonFilters {
  float* values;
  bool known = false;
};

// Filters of rows of a phase in shared memory: [row][head of the block][tap].
struct FilterRows {
  float* values;
  int heads, pitch;  // pitch: from one head to the next, odd so that heads lie in different banks
  int lanes;         // that share a head

  CK_DEVICE FilterRows(const Problem& p, int lanes, char* shared)
      : values(reinterpret_cast<float*>(shared)),
        heads(32 / lanes),
        pitch(static_cast<int>(rows_pitch(p.taps.taps))),
        lanes(lanes) {}

  CK_DEVICE float* row(int number) const { return values + number * heads * pitch; }
  // Filters of a row for the head that lane serves.
  CK_DEVICE float* of_lane(int number, int lane) const { return row(number) + lane / lanes * pitch; }

  // Calls use(h0 + head, head, t, i, lane) for the heads of rows n .. n + rows - 1 of a phase, a group of lanes each,
  // as many at once as the taps allow; `lane` counts within the group. Rows that do not exist have t = -1. By one
  // warp.
  template <class Use>
  CK_DEVICE void for_each(const Problem& p, const Phase& phase, int64_t n, int rows, int64_t h0, const Use& use) const {
    const int lane = threadIdx.x % 32, width = group_width(p.taps.taps), groups = 32 / width;
    for (int item = 0; item < rows * heads; item += groups) {
      const int mine = item + lane / width, i = mine / heads, head = mine % heads;
      const int64_t t = phase.position(n + i);
      const bool exists = mine < rows * heads && t >= 0 && t < p.time && h0 + head < p.heads;
      use(h0 + head, head, exists ? t : -1, i, lane % width);
    }
  }

  // Lanes of a group: enough for the taps, at most a warp.
  static CK_DEVICE int group_width(int64_t taps) {
    int width = 1;
    while (width < 32 && width < taps) width *= 2;
    return width;
  }

  // Fills rows `first` .. of the table with the filters of rows n .. n + kRun - 1 of a phase. By one warp.
  CK_DEVICE void fill(const Problem& p, const Phase& phase, int64_t b, int64_t n, int64_t h0, int first,
                      CommonFilters& common) const {
    const bool whole = !p.per_position && whole_windows(p, phase, n);
    if (whole && common.known) {
#pragma unroll 1
      for (int at = threadIdx.x % 32; at < heads * pitch; at += 32)
        for (int i = 0; i < kRun; ++i) row(first + i)[at] = common.values[at];
      return;
    }
    const int width = group_width(p.taps.taps);
    for_each(p, phase, n, kRun, h0, [&](int64_t h, int head, int64_t t, int i, int lane) {
      const bool exists = t >= 0;
      const int64_t known = exists ? t : 0;
      const FilterAt f(p, b, known, exists ? h : 0);
      const Sequence sequence = sequence_of(p, known);
      const Statistics<float> statistics = warp_statistics<float>(p, f, known, lane, sequence, width, exists);
      if (i < kRun)
        for (int j = lane; j < p.taps.taps; j += width)
          row(first + i)[head * pitch + j] = exists ? tap_of(p, f, known, j, statistics, sequence).value() : 0.0f;
    });
    if (!whole) return;
    __syncwarp();
#pragma unroll 1
    for (int at = threadIdx.x % 32; at < heads * pitch; at += 32) common.values[at] = row(first)[at];
    common.known = true;
  }

  // Adds rows first .. first + count - 1 to the row at `sum`. By one warp.
  CK_DEVICE void add_up(int first, int count, float* sum) const {
#pragma unroll 1
    for (int at = threadIdx.x % 32; at < heads * pitch; at += 32)
      for (int i = 0; i < count; ++i) sum[at] += row(first + i)[at];
    __syncwarp();
  }
};

template <class T, bool kGate>
CK_GLOBAL(kStreamThreads, 2)
void rows_forward(const CK_PARAM Forward p, const CK_PARAM Columns columns, int lanes, int64_t groups) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, K = static_cast<int>(p.taps.taps);
  const int window = static_cast<int>(stream_window(K));
  const int64_t R = p.head_channels();
  const int quad = quad_of_lane(R, lanes, lane);
  Work work(p, groups, columns);
  const int64_t h0 = work.c0 / R;
  char* shared = shared_memory();
  const FilterRows filters(p, lanes, shared);
  CommonFilters common{filters.row(kChunk + warp)};
  shared += rows_table_bytes(K, lanes, p.per_position ? kChunk : kChunk + kStreamWarps);
  const InputRing<T, kGate> input(shared, window);
  const Quad bias = load_bias(p, work.c0 + quad * kQuad);

  for (Run run; work.next(run);) {
    const Reach reach(p.taps, run.phase);
    const int64_t n0 = run.start * kChunk, m0 = n0 + reach.offset;
    const auto issue = [&](int64_t chunk) {
      if (chunk < run.count + window - 1)
        input.issue(p, reach.to, run.b, m0 + chunk * kChunk, chunk, rows_reached(p.taps, run.count, chunk), work);
      cp_async_commit();
    };
    __syncthreads();  // the run before this one has been read
    for (int chunk = 0; chunk < (kGate ? kAhead : window + kAhead - 1); ++chunk) issue(chunk);
    for (int64_t k = kGate ? 1 - window : 0; k < run.count; ++k) {
      const int64_t n = n0 + k * kChunk + warp * kRun;
      // A warp makes the filters of its own rows, while inputs are on their way.
      if (k >= 0) filters.fill(p, reach.from, run.b, n, h0, warp * kRun, common);
      cp_async_wait<kAhead - 1>();
      __syncthreads();
      issue(k + window + kAhead - 1);
      if constexpr (kGate) {
        input.gate(k + window - 1, lane, warp);
        __syncthreads();
        if (k < 0) continue;
      }
      Quad total[kRun] = {};
      const Borders borders(p, p.taps, reach.from, n);
      const float* filter[kRun];
#pragma unroll
      for (int i = 0; i < kRun; ++i) filter[i] = filters.of_lane(warp * kRun + i, lane);
      walk_within(borders, input.ring, k * kChunk + warp * kRun, K, quad,
                  [&](auto fast, int j, const Quad(&rows)[kRun], int turn) {
#pragma unroll
                    for (int i = 0; i < kRun; ++i) {
                      if (!decltype(fast)::value && !borders.inside(i, j)) continue;
                      const float w = filter[i][j];
                      add_product(total[i], {{w, w, w, w}}, rows[(turn + i) % kRun]);
                    }
                  });
      store_output<T>(p, total, bias, reach.from, run.b, n, work, quad);
      __syncwarp();  // the filters have been read
    }
  }
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

// Through dropout and softmax: d(weight) of rows n .. n + kRun - 1 from their products; of filters that positions
// share, added to `sum`. It is linear in the products: pieces of a head are finished one by one, and rows with the same
// filter together. By one warp.
CK_DEVICE void finish_filters(const Backward& p, const FilterRows& products, const Phase& phase, int64_t b, int64_t n,
                              int64_t h0, int piece, int warp, float* sum) {
  const bool cut = p.head_channels() > kLaneRow, whole = !p.per_position && whole_windows(p, phase, n);
  void* const to = cut ? p.partial_weight : p.grad_weight;
  const Dtype dtype = cut ? Dtype::kFloat32 : p.weight_dtype;
  const int64_t first_row = ((cut ? piece * p.batch : 0) + b) * p.time;
  if (whole) products.add_up(warp * kRun + 1, kRun - 1, products.row(warp * kRun));
  const int rows = whole ? 1 : kRun, width = products.group_width(p.taps.taps);
  products.for_each(p, phase, n, rows, h0, [&](int64_t h, int head, int64_t t, int i, int lane) {
    const bool exists = t >= 0;
    const int64_t known = exists ? t : 0, K = exists ? p.taps.taps : 0;
    const FilterAt f(p, b, known, exists ? h : 0);
    const Sequence sequence = sequence_of(p, known);
    const Statistics<float> statistics = warp_statistics<float>(p, f, known, lane, sequence, width, exists);
    float* const d = products.row(warp * kRun + (exists ? i : 0)) + head * products.pitch;
    float inner = 0;
    for (int j = lane; j < K; j += width) {
      const Tap<float> tap = tap_of(p, f, known, j, statistics, sequence);
      d[j] *= tap.factor;
      inner += tap.p * d[j];
    }
    inner = lane_sum(inner, width);
    for (int j = lane; j < K; j += width) {
      const float share = p.softmax ? tap_of(p, f, known, j, statistics, sequence).p * (d[j] - inner) : d[j];
      if (p.per_position)
        store_as(to, ((first_row + known) * p.heads + h) * p.taps.taps + j, dtype, share);
      else
        d[j] = share;
    }
  });
  __syncwarp();
  if (!p.per_position) {
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
  const FilterRows filters(p, lanes, shared_memory()), products(p, lanes, shared_memory() + window * table_bytes);
  char* shared = shared_memory() + (window + 1) * table_bytes;
  const FilterRows sums(p, lanes, shared);
  CommonFilters common{sums.row(kStreamWarps + warp)};
  if (!p.per_position) {
    shared += rows_table_bytes(K, lanes, 2 * kStreamWarps);
#pragma unroll 1
    for (int at = lane; at < sums.heads * sums.pitch; at += 32) sums.row(warp)[at] = 0;
  }
  const Ring<T> ring{reinterpret_cast<T*>(shared), window + kAhead};
  const InputRing<T, kGate> input(reinterpret_cast<char*>(ring.end()), window);
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
    __syncthreads();  // the run before this one has been read
    for (int chunk = 0; chunk < kAhead; ++chunk) issue(chunk);
    for (int64_t k = 1 - window; k < run.count; ++k) {
      const int64_t arrived = k + window - 1;
      cp_async_wait<kAhead - 1>();
      __syncthreads();
      issue(arrived + kAhead);
      if (need_input)
        filters.fill(p, reach.to, run.b, m0 + arrived * kChunk + warp * kRun, h0,
                     static_cast<int>(arrived % window) * kChunk + warp * kRun, common);
      if constexpr (kGate)
        if (need_weight) input.gate(arrived, lane, warp);
      __syncthreads();
      if (k < 0) continue;
      const int64_t own = k * kChunk + warp * kRun, n = n0 + own;
      if (need_bias) add_rows(bias_sum, ring, own - reach.offset - ahead, quad);
      if (need_weight) {
        Quad dy[kRun];
        const T* row = ring.row(own - reach.offset - ahead);
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
        finish_filters(p, products, back.from, run.b, n - ahead, h0, work.piece, warp, sums.row(warp));
      }
      if (!need_input) continue;
      Quad dz[kRun] = {};
      const Borders borders(p, taps, reach.from, n);
      int at = static_cast<int>(k % window) * kChunk + warp * kRun;  // the filters of row n + reach.offset
      walk_within(borders, ring, own, K, quad, [&](auto fast, int j, const Quad(&rows)[kRun], int turn) {
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          if (!decltype(fast)::value && !borders.inside(i, j)) continue;
          const int row = at + i < window * kChunk ? at + i : at + i - window * kChunk;
          const float w = filters.of_lane(row, lane)[K - 1 - j];
          add_product(dz[i], {{w, w, w, w}}, rows[(turn + i) % kRun]);
        }
        at = at + 1 < window * kChunk ? at + 1 : 0;
      });
      mask_rows(p, dz, reach.from, run.b, n);
      if constexpr (kGate) {
        Quad dgate[kRun] = {};
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          const int64_t s = reach.from.position(n + i), c = work.c0 + quad * kQuad;
          if (s >= p.time || quad * kQuad >= work.channels || masked(p, run.b, s)) continue;
          const auto load = [&](const Rows& rows) {
            return load_quad(cuda::at<const T>(rows, run.b, s, c), kQuad, p.vector_bytes);
          };
          gate_gradient<T>(dz[i], dgate[i], load(p.x), load(p.gate));
        }
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
