// The backward pass of the band family: all gradients from one walk over d(y) and z. With the matrices A of 16 outputs,
//
//   d(z)[u, c] = sum over r of A[r, u] d(y)[r, c],      d(filter of row r)[j] = G[r, r + j],  G[r, u] = d(y)[r] . z[u].
//
// Tile i of the inputs is reached by tiles i .. i + steps - 1 of the outputs. When it has come, its d(z) can be found,
// and the filters' gradients of output tile i, whose inputs are tiles i - steps + 1 .. i.
#pragma once

#include "csrc/cuda/conv/band_gradients.cuh"
#include "csrc/cuda/conv/band_slow.cuh"

namespace ck::cuda {

// Stores a tile of d(x), part of which may be rows of the state, from shared memory. By the warp.
template <class T, class Unit>
CK_DEVICE void store_with_state(const Backward& p, const Unit& unit, const TileRows& rows, int tile, const T* from) {
  const int channels = unit.channels - unit.column;
  if (channels <= 0) return;
#pragma unroll 1
  for (int turn = 0; turn < Unit::kTurns; ++turn) {
    const int row = unit.row + turn * Unit::kRowStep;
    const int64_t s = rows.position(int64_t{tile} * kBandTile + row), c = unit.c0 + unit.column;
    T* const to = s >= p.time ? nullptr
                  : s < 0     ? state_at<T>(p, p.grad_state, rows.b, s, c, {0, 0, p.time, kUnbounded})
                              : (p.grad_x.data == nullptr ? nullptr : at<T>(p.grad_x, rows.b, s, c));
    uint32_t words[4];
    load_vector(words, from + row * Unit::kPitch + unit.column);
    if (to != nullptr) store_pieces(to, words, channels, p.vector_bytes);
  }
}

// Blocks as in band_forward.
template <class T, int kWidth, bool kGate, bool kOwn, int kSteps>
CK_GLOBAL(32 * kBandWarps, 2)
void band_backward(const CK_PARAM Backward p) {
  using GradRing = TileRing<T, false, kWidth, kBandGradAhead>;
  using Ring = TileRing<T, kGate, kWidth, kBandGradAhead, kBandGradAhead + 1>;
  constexpr bool kFloat16 = std::is_same_v<T, f16>;
  CK_SHARED(float, slow_sums, kOwn ? 1 : kBandWarps * kBandMaxTaps);
  const BandShape shape(p.taps.taps, p.head_channels(), kFloat16, kGate);
  const BandUnit<kWidth> unit(p, shape, p.groups);
  const Taps back = p.taps.transposed();
  const int lane = unit.lane, steps = shape.steps, K = static_cast<int>(p.taps.taps);
  const bool need_input = p.grad_x.data != nullptr || p.grad_gate.data != nullptr || p.grad_state != nullptr;
  const bool need_weight = p.grad_weight != nullptr, need_bias = p.grad_bias != nullptr;

  const int bytes = band_backward_bytes(shape, kFloat16, kGate, kOwn, K);
  char* shared = shared_memory() + unit.warp * bytes;
  // Of as many tiles of outputs as inputs are reached by, in turn.
  const BandMatrix matrices(shared, shape, kBandTile * (steps - 1) - (K - 1));
  shared += (kOwn ? steps : 1) * shape.matrix_bytes();
  const GradRing grad_ring(shared, steps);
  shared += GradRing::bytes(steps);
  const Ring ring(shared, steps);
  float* const strip = reinterpret_cast<float*>(shared + Ring::bytes(steps));
  float* const probabilities = strip + band_strip_bytes(K) / 4;
  const int probability_pitch = band_probability_pitch(K);
  char* const block = shared_memory() + unit.units * bytes;
  LogitTiles logits(p, shape, unit, LogitMemory::of_weight(p), block);
  LogitTiles logit_grads(p, shape, unit, LogitMemory::of_gradient(p), logits.at(1 + kBandGradAhead, 0));
  // d(weight) is summed over pieces of heads afterwards.
  const bool cut = !band_whole_heads(shape.pieces, unit.units);

  for (int n = 0; n < (kOwn ? steps : 1); ++n) matrices.other(n).clear(lane);
  float* const warp_sums = slow_sums + (kOwn ? 0 : unit.warp * kBandMaxTaps);
  if (!kOwn) {
    if (unit.channels == 0) return;
    for (int j = lane; j < K; j += 32) warp_sums[j] = 0;
    __syncwarp();
    make_shared_filters(p, matrices, unit);
  }
  float g[2 * kSteps][4] = {};
  // A lane's, of the channels of its vectors.
  constexpr bool kBiasInMemory = band_bias_in_memory(kOwn, kWidth);
  float bias_sums[kBiasInMemory ? 1 : 8] = {};
  float* const stored_sums = probabilities + steps * kBandTile * probability_pitch + lane;
  const auto bias_sum = [&](int e) -> float& {
    if constexpr (kBiasInMemory)
      return stored_sums[32 * e];
    else
      return bias_sums[e];
  };
  if (need_bias)
    for (int e = 0; e < 8; ++e) bias_sum(e) = 0;

  // Rows of the state come before the others; the last windows of a phase may reach outputs after its last input.
  const int64_t before = p.state == nullptr ? 0 : p.taps.span();
  const int64_t extra = ceil_div(p.taps.span() - p.taps.left, p.taps.dilation);
  for_runs(p, unit, p.groups, before, extra, [&](const TileRows& rows, int count) {
    const TileRows outputs{rows.b, back.source(rows.first, 0), rows.dilation};
    TileWalk<false, GradRing, T> grad;
    TileWalk<true, Ring, T> input;
    const int wanted = count * kBandTile;
    grad.start(p, outputs, 0, wanted + K - 1, unit);
    input.start(p, rows, 1 - steps, wanted, unit);
    TileStores<T, kWidth> to_x(p.grad_x, rows, unit), to_gate(p.grad_gate, rows, unit);
    const int left = rows_of_run(p, rows, count);
    if constexpr (kOwn) {
      logits.start(p, LogitMemory::of_weight(p), outputs, unit);
      logit_grads.start(p, LogitMemory::of_gradient(p), outputs, unit);
    }
    // Tile n of the outputs arrives with tile n - steps + 1 of the inputs.
    const auto issue = [&](int n) {
      if (n < count + steps - 1) {
        grad.copy(p, grad_ring, unit);
        if (need_weight || kGate) input.copy(p, ring, unit);
        if constexpr (kOwn) logits.copy(p, n % (1 + kBandGradAhead));
      }
      cp_async_commit();
    };
    // What the mask says of row lane % 16 of the next tile of inputs: read a tile ahead.
    bool open = true;
    const auto look_at_mask = [&](int tile) {
      const int64_t s = rows.position(int64_t{tile} * kBandTile + lane % kBandTile);
      open = s < 0 || s >= p.time || !masked(p, rows.b, s);
    };
    if (p.mask != nullptr) look_at_mask(0);
    sync_copies<kOwn>();  // the run before this one has been read
    // Slots: what has arrived, and where it lies as it came, logits like the inputs; the first tile of the windows; of
    // matrices.
    static_assert(Ring::kTurns == 1 + kBandGradAhead);
    int grad_arrived = 0, grad_raw = 0, arrived = 0, raw = 0, grad_window = 0, window = 0, matrix = 0;
    for (int i = 1 - steps - kBandGradAhead; i < count; ++i) {
      if (i > -steps) {  // before, there is nothing to wait for
        cp_async_wait<kBandGradAhead - 1>();
        if constexpr (!GradRing::kDirect) grad_ring.split(grad_arrived, grad_raw, unit, p.gate_activation);
        if constexpr (!Ring::kDirect)
          if (need_weight || kGate) ring.split(arrived, raw, unit, p.gate_activation);
        sync_copies<kOwn>();
      }
      issue(i + steps - 1 + kBandGradAhead);
      if (i <= -steps) continue;
      if constexpr (kOwn) {
        if (i > 0 && need_weight && !cut) logit_grads.store(p, (i - 1) % 2);
        if (unit.channels != 0)
          make_own_filters<T>(p, matrices.other(matrix), unit, logits, raw, outputs, i + steps - 1,
                              [&](int j, float value) {
                                probabilities[(matrix * kBandTile + lane / 2) * probability_pitch + j] = value;
                              });
        __syncwarp();
      }
      const int raw_here = raw;  // x and the gate of tile i
      grad_arrived = grad_ring.after(grad_arrived, 1);
      arrived = ring.after(arrived, 1);
      grad_raw = GradRing::next_raw(grad_raw);
      raw = Ring::next_raw(raw);
      // The oldest filters are the next slot's.
      matrix = matrix + 1 < steps ? matrix + 1 : 0;
      if (i < 0) continue;
      unsigned open_rows = kAllLanes;
      if (p.mask != nullptr) {
        open_rows = __ballot_sync(kAllLanes, open);
        look_at_mask(i + 1);
      }

      if (need_bias) {
#pragma unroll 1
        for (int turn = 0; turn < unit.kTurns; ++turn)
          for (int part = 0; part < GradRing::kParts; ++part) {
            float dy[8];
            const T* const from = grad_ring.at(grad_window) + part * GradRing::kTile +
                                  (unit.row + turn * unit.kRowStep) * unit.kPitch + unit.column;
            if constexpr (GradRing::kDirect)
              unpack_vector(dy, from);
            else
              unpack_vector(dy, reinterpret_cast<const bf16*>(from));
            for (int e = 0; e < 8; ++e) bias_sum(e) += dy[e];
          }
      }
      if (need_weight) {
        const auto z_tile = [&](int s) { return ring.at(ring.after(window, s)); };
        bool fast = true;
        if constexpr (!kOwn) {
          fast = whole_tile(p, p.taps, outputs, i);
          // Rows of d(y) that do not exist are zeros, which are no part of any sum: not even if z is not finite.
          if (fast && (outputs.position(int64_t{i} * kBandTile) < 0 ||
                       outputs.position(int64_t{i} * kBandTile + kBandTile - 1) >= p.time)) {
            bool finite = true;
#pragma unroll 1
            for (int s = 0; s < steps; ++s) finite = finite_rows(z_tile(s), unit) && finite;
            fast = __all_sync(kAllLanes, finite) != 0;
          }
        }
        if (fast)
          pair_product<GradRing, Ring, kOwn, kSteps>(g, steps, grad_ring.at(grad_window), lane, z_tile);
        else
          slow_taps<T>(p, unit, outputs, i, warp_sums);
        __syncwarp();
        if constexpr (kOwn) {
          put_band(strip, g, matrices.shift, K, lane);
          __syncwarp();
          const int row = lane / 2;
          const int64_t t = outputs.position(int64_t{i} * kBandTile + row);
          const bool exists = t >= 0 && t < p.time && unit.channels != 0;
          const FilterAt at(p, rows.b, exists ? t : 0, unit.head);
          // Tile i's filters are those of the slot after the one that was made just now.
          const float* const own = probabilities + (matrix * kBandTile + row) * probability_pitch;
          float* const sums = strip + strip_row(row, K);
          if (exists && p.offsets != nullptr) {
            // Rows of other sequences are zeros to this one.
            const Sequence sequence = sequence_of(p, t);
#pragma unroll 1
            for (int j = lane % 2; j < K; j += 2)
              if (!sequence.contains(p.taps.source(t, j))) sums[j] = 0;
          }
          if (shape.pieces > 1 && !cut) {
            __syncthreads();  // the sums of the other pieces are there
            if (unit.piece == 0)
#pragma unroll 1
              for (int j = lane % 2; j < K; j += 2)
                for (int piece = 1; piece < shape.pieces; ++piece) sums[j] += sums[j + piece * bytes / 4];
          }
          if (cut) {
            float* const to = static_cast<float*>(p.partial_weight) +
                              (((unit.piece * p.batch + rows.b) * p.time + t) * p.heads + unit.head) * K;
            finish_own_filters(p, at, lane, sums, own, [&](int j, float value) {
              if (exists) to[j] = value;
            });
          } else if (unit.piece == 0) {
            char* const to = logit_grads.at(i % 2, row) + (unit.head - unit.first_head) * K * logit_bytes(p);
            finish_own_filters(p, at, lane, sums, own, [&](int j, float value) {
              if (exists) store_as(to, j, p.weight_dtype, value);
            });
          }
          __syncwarp();
        }
      }
      T* const done = grad_ring.at(grad_window);  // which no later tile reaches
      T* const done_z = ring.at(window);
      if (need_input) {
        float dz[2 * Ring::kGroups][4] = {};
        band_product<GradRing>(
            dz, steps, lane,
            [&](auto& a, int term, int k) {
              int slot = matrix + k;
              slot = slot < steps ? slot : slot - steps;
              (kOwn ? matrices.other(slot) : matrices).load_transposed(a, term, steps - 1 - k, lane);
            },
            [&](int k) { return grad_ring.at(grad_ring.after(grad_window, k)); });
        if (p.mask != nullptr) {
          const unsigned bits = open_rows >> lane / 4;
#pragma unroll
          for (int n = 0; n < 2 * Ring::kGroups; ++n)
            for (int e = 0; e < 4; ++e) dz[n][e] = (bits >> e / 2 * 8 & 1) != 0 ? dz[n][e] : 0.0f;
        }
        __syncwarp();  // the tiles that results are put over have been read
        bool fast = true;
        if constexpr (kGate) {
          float dgate[2 * Ring::kGroups][4];
          const T* const x = ring.raw(raw_here) + lane / 4 * unit.kPitch + lane % 4 * 2;
#pragma unroll
          for (int n = 0; n < 2 * Ring::kGroups; ++n) {
            float own[4], gate[4];
            for (int e = 0; e < 4; ++e) {
              const int place = 8 * n + e / 2 * 8 * unit.kPitch + e % 2;
              own[e] = widen(x[place]);
              gate[e] = widen(x[Ring::kTile + place]);
            }
            gate_gradient<T>(dz[n], dgate[n], own, gate, p.gate_activation);
          }
          fast = put_tile<T>(done_z, dgate, lane);
        }
        fast = put_tile<T>(done, dz, lane) && fast && (kOwn || whole_tile(p, back, rows, i));
        __syncwarp();
        if (!fast) {
          slow_inputs<T>(p, unit, rows, i);
          to_x.skip(p, p.grad_x);
          to_gate.skip(p, p.grad_gate);
        } else {
          if (rows.position(int64_t{i} * kBandTile) < 0) {
            store_with_state(p, unit, rows, i, done);
            to_x.skip(p, p.grad_x);
          } else if (p.grad_x.data != nullptr) {
            to_x.store(done, p, p.grad_x, left - i * kBandTile, unit);
          }
          if (kGate && p.grad_gate.data != nullptr) to_gate.store(done_z, p, p.grad_gate, left - i * kBandTile, unit);
        }
      }
      grad_window = grad_ring.after(grad_window, 1);
      window = ring.after(window, 1);
    }
    if constexpr (kOwn)
      if (need_weight && !cut) {
        __syncthreads();
        logit_grads.store(p, (count - 1) % 2);
      }
  });

  // Owner and group, which blocks have in turn after the units. Found anew: there is no register to keep them in.
  const int64_t partial = blockIdx.x / (gridDim.x / static_cast<unsigned>(p.owners() * p.groups));
  if (!kOwn && need_weight) {
    float* const products = reinterpret_cast<float*>(grad_ring.base);
    __syncwarp();
    put_band(products, g, matrices.shift, K, lane);
    __syncwarp();
    const int64_t column = int64_t{unit.head} * shape.pieces + unit.piece, columns = p.heads * shape.pieces;
    for (int j = lane; j < K; j += 32) {
      float total = warp_sums[j];
      for (int r = 0; r < kBandTile; ++r) total += products[strip_row(r, K) + j];
      static_cast<float*>(p.partial_weight)[(partial * columns + column) * K + j] = total;
    }
  }
  if (need_bias) {
    // Lanes of a column have different rows.
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      float total = bias_sum(e);
      for (int distance = unit.kRowDistance; distance < unit.kRowDistance * unit.kRowStep; distance *= 2)
        total += __shfl_xor_sync(kAllLanes, total, distance);
      if (unit.row == 0 && unit.column + e < unit.channels)
        static_cast<float*>(p.partial_bias)[partial * p.channels + unit.c0 + unit.column + e] = total;
    }
  }
}

}  // namespace ck::cuda
