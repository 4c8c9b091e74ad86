// Filters that all positions share, channels side by side in memory: blocks walk along time, rows pass through a ring
// of shared memory once, and each thread keeps the window of its run of rows in registers.
#pragma once

#include <type_traits>

#include "../common/switch.h"
#include "quads.cuh"

namespace ck::cuda {

// What a block of the stream kernels does: a block of kLaneRow channels of one owner, `each` chunks of its rows.
struct StreamShape {
  int64_t channel_blocks, chunks_of_phase;
  int window_chunks;  // chunks that the windows of a chunk of outputs reach into

  CK_HD StreamShape(const Problem& p)
      : channel_blocks(ceil_div(p.channels, kLaneRow)),
        chunks_of_phase(ceil_div(ceil_div(p.time, p.taps.dilation), kChunk)),
        window_chunks(static_cast<int>(stream_window(p.taps.taps))) {}

  // Chunks of an owner's batch rows, phase by phase.
  CK_HD int64_t chunks(const Problem& p) const { return p.owner_batch() * p.taps.dilation * chunks_of_phase; }
};

// Filter values of a block's channels. kShared: heads are whole quads, and a quad has one value; the odd pitch lets a
// warp write a column. Otherwise there is a value per channel.
template <bool kShared>
struct FilterTable {
  static constexpr int kPitch = kShared ? kLaneRow / kQuad + 1 : kLaneRow;
  float* values;

  CK_DEVICE void fill(const Problem& p, int64_t owner, int64_t c0) const {
    const int64_t R = p.head_channels(), K = p.taps.taps, end = least(c0 + kLaneRow, p.channels);
    const Sequence anywhere{0, 0, 0, kUnbounded};
    if constexpr (kShared) {
      const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
      for (int64_t h = c0 / R + warp; h * R < end; h += kStreamWarps) {
        const FilterAt f(p, owner, 0, h);
        const Statistics<float> statistics = warp_statistics<float>(p, f, 0, lane, anywhere);
        const int64_t first = (most(h * R, c0) - c0) / kQuad, last = (least((h + 1) * R, end) - c0) / kQuad;
        for (int64_t j = lane; j < K; j += 32) {
          const float value = tap_of(p, f, 0, j, statistics, anywhere).value();
          for (int64_t q = first; q < last; ++q) values[j * kPitch + q] = value;
        }
      }
    } else {
      const int64_t c = c0 + threadIdx.x;
      if (c >= end) return;
      const FilterAt f(p, owner, 0, c / R);
      const Statistics<float> statistics = statistics_of<float>(p, f, 0, anywhere);
      for (int64_t j = 0; j < K; ++j)
        values[j * kPitch + threadIdx.x] = tap_of(p, f, 0, j, statistics, anywhere).value();
    }
  }

  CK_DEVICE Quad at(int64_t j, int lane) const {
    if constexpr (kShared) {
      const float w = values[j * kPitch + lane];
      return {{w, w, w, w}};
    } else {
      return load_quad(values + j * kPitch + lane * kQuad);
    }
  }
};

// Copies a chunk of rows: copy(to, position, channel) starts the copy of 16 bytes.
template <class T, class Copy>
CK_DEVICE void copy_chunk(T* to, const Phase& phase, int64_t first, int64_t c0, const Copy& copy) {
  constexpr int kVectors = kLaneRow / kVector<T>;
  for (int i = threadIdx.x; i < kChunk * kVectors; i += kStreamThreads) {
    const int row = i / kVectors, c = i % kVectors * kVector<T>;
    copy(to + row * kLaneRow + c, phase.position(first + row), c0 + c);
  }
}

// Blocks: channel blocks, then groups, then owners. With a gate, rows are gated on their way, once, into a ring of
// float32.
template <class T, bool kShared, bool kGate>
CK_GLOBAL(kStreamThreads, 3)
void stream_forward(const CK_PARAM Forward p, int64_t groups) {
  using E = std::conditional_t<kGate, float, T>;
  const StreamShape shape(p);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, K = static_cast<int>(p.taps.taps);
  const int window = shape.window_chunks;
  const int64_t c0 = blockIdx.x % shape.channel_blocks * kLaneRow, channels = least(p.channels - c0, int64_t{kLaneRow});
  const int64_t group = blockIdx.x / shape.channel_blocks % groups, owner = blockIdx.x / shape.channel_blocks / groups;
  const int64_t all = shape.chunks(p), each = ceil_div(all, groups), last = least((group + 1) * each, all);

  char* room = shared_memory();
  const FilterTable<kShared> table{reinterpret_cast<float*>(room)};
  room += stream_table_bytes(K, kShared);
  const int slots = kGate ? window : window + kAhead;
  const Ring<E> ring{reinterpret_cast<E*>(room), slots * kChunk};
  constexpr int kRaw = 1 + kAhead;
  T* const raw_x =
      kGate ? reinterpret_cast<T*>(room + window * stream_chunk_bytes(sizeof(float))) : reinterpret_cast<T*>(room);
  T* const raw_gate = raw_x + kRaw * kChunk * kLaneRow;
  const int raw_slots = kGate ? kRaw : slots;

  table.fill(p, owner, c0);
  Quad bias{};
  if (p.bias != nullptr)
    for (int e = 0; e < kQuad; ++e)
      if (lane * kQuad + e < channels) bias.v[e] = load_as<float>(p.bias, c0 + lane * kQuad + e, p.bias_dtype);

  for (int64_t unit = group * each; unit < last;) {
    const int64_t run = unit / shape.chunks_of_phase, start = unit % shape.chunks_of_phase;
    const int64_t b = owner + run / p.taps.dilation, count = least(shape.chunks_of_phase - start, last - unit);
    unit += count;
    const Reach reach(p.taps, run % p.taps.dilation);
    const int64_t n0 = start * kChunk, m0 = n0 + reach.offset;
    const auto issue = [&](int64_t chunk) {
      if (chunk < count + window - 1) {
        const int64_t room_of = chunk % raw_slots * kChunk * kLaneRow;
        copy_chunk(raw_x + room_of, reach.to, m0 + chunk * kChunk, c0,
                   [&](T* to, int64_t s, int64_t c) { stage_input(to, p, p.x, b, s, c); });
        if (kGate)
          copy_chunk(raw_gate + room_of, reach.to, m0 + chunk * kChunk, c0,
                     [&](T* to, int64_t s, int64_t c) { stage_input(to, p, p.gate, b, s, c); });
      }
      cp_async_commit();
    };
    __syncthreads();  // the run before this one has been read
    for (int chunk = 0; chunk < (kGate ? kAhead : window + kAhead - 1); ++chunk) issue(chunk);
    for (int64_t k = kGate ? 1 - window : 0; k < count; ++k) {
      cp_async_wait<kAhead - 1>();
      __syncthreads();
      issue(k + window + kAhead - 1);
      if constexpr (kGate) {
        const int64_t chunk = k + window - 1, from = chunk % kRaw * kChunk * kLaneRow;
        for (int row = warp; row < kChunk; row += kStreamWarps) {
          const Quad x = load_quad(raw_x + from + row * kLaneRow + lane * kQuad);
          const Quad gate = load_quad(raw_gate + from + row * kLaneRow + lane * kQuad);
          Quad z;
          for (int e = 0; e < kQuad; ++e) z.v[e] = x.v[e] * sigmoid(gate.v[e]);
          store_quad(ring.row(chunk * kChunk + row) + lane * kQuad, z);
        }
        __syncthreads();
        if (k < 0) continue;
      }
      const int64_t n = n0 + k * kChunk + warp * kRun;
      Quad total[kRun] = {};
      const Borders borders(p, reach, n, K);
      const auto add = [&](auto checked) {
        walk(ring, k * kChunk + warp * kRun, K, lane, [&](int j, const Quad(&window_rows)[kRun], int turn) {
          const Quad w = table.at(j, lane);
#pragma unroll
          for (int i = 0; i < kRun; ++i) {
            if (decltype(checked)::value && !borders.inside(i, reach.to.position(n + reach.offset + j + i))) continue;
            const Quad& x = window_rows[(turn + i) % kRun];
#pragma unroll
            for (int e = 0; e < kQuad; ++e) total[i].v[e] += w.v[e] * x.v[e];
          }
        });
      };
      if (borders.whole)
        add(Bool<false>{});
      else
        add(Bool<true>{});
      if (p.bias != nullptr)
#pragma unroll
        for (int i = 0; i < kRun; ++i)
          for (int e = 0; e < kQuad; ++e) total[i].v[e] += bias.v[e];
      store_run(
          total, lane, channels,
          [&](int i) {
            const int64_t t = reach.from.position(n + i);
            return t < p.time ? at<T>(p.y, b, t, c0) : nullptr;
          },
          static_cast<T*>(nullptr));
    }
  }
}

}  // namespace ck::cuda
