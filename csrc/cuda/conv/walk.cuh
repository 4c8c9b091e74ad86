// Walking along time: which rows a block takes, and how they pass through shared memory.
#pragma once

#include <type_traits>

#include "csrc/cuda/conv/filters.cuh"
#include "csrc/cuda/conv/finish.cuh"
#include "csrc/cuda/conv/ring.cuh"

namespace ck::cuda {

// Chunks of rows [start, start + count) of a phase of batch row b.
struct Run {
  int64_t b, phase, start, count;
};

// What a block does: a block of at most kLaneRow channels, and of an owner's batch rows, phase by phase, the chunks of
// one group. Blocks are channel blocks, then groups, then owners. Positions begin at -before, a multiple of the
// dilation.
struct Work {
  int64_t c0, channels, group, owner;
  int piece;  // of a head, if heads are cut

  CK_DEVICE Work(const Problem& p, int64_t groups, const Columns& columns, int64_t before = 0) {
    // A grid has fewer than 2^31 blocks.
    const uint32_t block = blockIdx.x % columns.blocks, others = blockIdx.x / columns.blocks;
    const int64_t first = block / columns.pieces * columns.span;
    piece = static_cast<int>(block % columns.pieces);
    c0 = first + piece * columns.width;
    channels = min(min(first + columns.span, p.channels) - c0, columns.width);
    group = others % static_cast<uint32_t>(groups);
    owner = others / static_cast<uint32_t>(groups);
    dilation_ = p.taps.dilation;
    per_phase_ = ceil_div(ceil_div(p.time + before, dilation_), kChunk);
    const int64_t all = p.owner_batch() * dilation_ * per_phase_, each = ceil_div(all, groups);
    next_ = group * each;
    last_ = min(next_ + each, all);
  }

  CK_DEVICE bool next(Run& run) {
    if (next_ >= last_) return false;
    const int64_t number = next_ / per_phase_, start = next_ % per_phase_;
    run = {owner + number / dilation_, number % dilation_, start, min(per_phase_ - start, last_ - next_)};
    next_ += run.count;
    return true;
  }

 private:
  int64_t dilation_, per_phase_, next_, last_;
};

// Of a chunk of those that a run of `count` chunks reaches, the rows that its windows do.
CK_DEVICE int rows_reached(const Taps& taps, int64_t count, int64_t chunk) {
  return static_cast<int>(min((count - chunk) * kChunk + taps.taps - 1, int64_t{kChunk}));
}

static_assert(kChunk == 32);  // as stage_rows has it

// Starts the copy of a chunk of x or the gate, or of d(y), whose first row is row `first` of the phase; `wanted` rows
// of it.
template <class T, bool kInput, class P>
CK_DEVICE void copy_chunk(T* to, const P& p, const Rows& rows, const Phase& phase, int64_t b, int64_t first, int wanted,
                          const Work& work) {
  stage_rows<T, kInput, kStreamThreads, 4>(to, kLaneRow, sizeof(T) == 4 ? 5 : 4, p, rows, b, phase.position(first),
                                           phase.dilation, wanted, work.c0, static_cast<int>(work.channels));
}
// Of x, and where there is one of the gate, one after the other: both at once would be twice the code.
template <class T>
CK_DEVICE void copy_inputs(T* x, T* gate, bool gated, const Problem& p, const Phase& phase, int64_t b, int64_t first,
                           int wanted, const Work& work) {
#pragma unroll 1
  for (int n = 0; n < (gated ? 2 : 1); ++n) {
    const Rows rows = n == 0 ? p.x : p.gate;
    copy_chunk<T, true>(n == 0 ? x : gate, p, rows, phase, b, first, wanted, work);
  }
}
template <class T>
CK_DEVICE void copy_gradient(T* to, const Backward& p, const Phase& phase, int64_t b, int64_t first, int wanted,
                             const Work& work) {
  copy_chunk<T, false>(to, p, p.grad, phase, b, first, wanted, work);
}

// Rows of z in windows of some chunks. With a gate they are gated on their way, once: x and gate come in through rings
// of their own, and `ring` holds float32. kCopies: chunks that are copied while one is computed.
template <class T, bool kGate, int kCopies>
struct InputRing {
  using E = std::conditional_t<kGate, float, T>;
  static constexpr int kRaw = 1 + kCopies;
  Ring<E> ring;
  Ring<T> x, open;

  CK_DEVICE InputRing(char* shared, int window)
      : ring{reinterpret_cast<E*>(shared), kGate ? window : window + kCopies},
        x{reinterpret_cast<T*>(kGate ? shared + window * stream_chunk_bytes(sizeof(float)) : shared),
          kGate ? kRaw : window + kCopies},
        open{x.end(), kRaw} {}

  CK_DEVICE void issue(const Problem& p, const Phase& phase, int64_t b, int64_t first, int64_t chunk, int wanted,
                       const Work& work) const {
    copy_inputs(x.chunk(chunk), open.chunk(chunk), kGate, p, phase, b, first, wanted, work);
  }

  // Gates a chunk that has arrived.
  CK_DEVICE void gate(int64_t chunk, int lane, int warp, Activation gates) const {
    with_activation(gates, [&](Activation act) {
#pragma unroll 2
      for (int n = 0; n < kChunk / kStreamWarps; ++n) {
        const int row = warp + n * kStreamWarps, at = row * kLaneRow + lane * kQuad;
        Quad z = load_quad(x.chunk(chunk) + at);
        apply_gate<T>(z.v, load_quad(open.chunk(chunk) + at).v, act);
        store_quad(ring.row(chunk * kChunk + row) + lane * kQuad, z);
      }
    });
  }

  // The loop of the forward passes over the chunks of a run: waits for the inputs that the windows of chunk k reach
  // last, starts the copies of those kCopies later, gates them if there is a gate, and calls compute(k). also(k):
  // starts the copies of what else chunk k needs, a chunk ahead.
  template <class Also, class Compute>
  CK_DEVICE void for_chunks(const Problem& p, const Reach& reach, const Run& run, int window, const Work& work,
                            Activation gates, const Also& also, const Compute& compute) const {
    const int64_t first_row = run.start * kChunk + reach.offset;
    __syncthreads();  // the run before this one has been read
    // At first there is nothing to wait for. The chunks of the first window are gated before there is anything to
    // compute.
    const int first = kGate ? 1 - window : 0;
    for (int64_t k = 1 - window - kCopies; k < run.count; ++k) {
      if (k >= first) {
        // All but the last inputs that were asked for, and so what else there is, which is asked for before them.
        cp_async_wait<kCopies - 1>();
        __syncthreads();
      }
      if (k >= -1) also(k + 1);
      if (k < run.count - kCopies) {
        const int64_t chunk = k + window + kCopies - 1;
        issue(p, reach.to, run.b, first_row + chunk * kChunk, chunk, rows_reached(p.taps, run.count, chunk), work);
      }
      cp_async_commit();
      if constexpr (kGate)
        if (k >= first) {
          gate(k + window - 1, threadIdx.x % 32, threadIdx.x / 32, gates);
          __syncthreads();
        }
      if (k >= 0) compute(k);
    }
  }
};

CK_DEVICE Quad load_bias(const Forward& p, int64_t c) {
  Quad bias{};
  if (p.bias != nullptr)
    for (int e = 0; e < kQuad; ++e)
      if (c + e < p.channels) bias.v[e] = load_as<float>(p.bias, c + e, p.bias_dtype);
  return bias;
}

// Stores rows n .. n + kRun - 1 of a phase, those that exist.
template <class T>
CK_DEVICE void store_rows(const Problem& p, const Rows& to, const Quad (&run)[kRun], const Phase& phase, int64_t b,
                          int64_t n, const Work& work, int lane) {
  const int64_t t = phase.position(n);
  T* const row = static_cast<T*>(to.data) + b * to.batch + t * to.time + work.c0;
  if (p.vector_bytes == 16)
    store_vectors(run, lane, work.channels, row, phase.dilation * to.time, t, p.time, phase.dilation);
  else
    store_pieces(run, lane, work.channels, row, phase.dilation * to.time, t, p.time, phase.dilation, p.vector_bytes);
}

// kFinish: they go through the epilogue first.
template <class T, bool kFinish>
CK_DEVICE void store_output(const Forward& p, Quad (&run)[kRun], const Quad& bias, const Phase& phase, int64_t b,
                            int64_t n, const Work& work, int lane) {
  if (p.bias != nullptr)
#pragma unroll
    for (int i = 0; i < kRun; ++i)
      for (int e = 0; e < kQuad; ++e) run[i].v[e] += bias.v[e];
  if constexpr (kFinish) {
    // Of all rows at once there would be too many registers.
    constexpr int kRows = kRun / 2;
    const int count = static_cast<int>(work.channels) - lane * kQuad;
#pragma unroll
    for (int first = 0; first < kRun; first += kRows) {
      const int64_t t = phase.position(n + first);
      FinishAt<T>(p.finish, b, t, work.c0 + lane * kQuad)
          .template finish<kQuadWords<T>, kRows>(
              [&](int i) { return run[first + i].v; },
              [&](int i) { return within(t + i * phase.dilation, p.time) ? count : 0; },
              [&](const Rows& rows) { return phase.dilation * rows.time; }, p.vector_bytes);
    }
  }
  store_rows<T>(p, p.y, run, phase, b, n, work, lane);
}

// Adds rows first .. first + kRun - 1 of a ring to the sum for d(bias).
template <class E>
CK_DEVICE void add_rows(Quad& sum, const Ring<E>& ring, int64_t first, int lane) {
  const E* row = ring.row(first);
#pragma unroll
  for (int i = 0; i < kRun; ++i, row = ring.next(row)) {
    const Quad dy = load_quad(row + lane * kQuad);
    for (int e = 0; e < kQuad; ++e) sum.v[e] += dy.v[e];
  }
}

// Masked positions have no gradient: selected, since neighbours may hold NaN. By the warp, of which a lane reads the
// mask of one row, for all.
CK_DEVICE void mask_rows(const Problem& p, Quad (&run)[kRun], const Phase& phase, int64_t b, int64_t n) {
  if (p.mask == nullptr) return;
  const int64_t s = phase.position(n + threadIdx.x % kRun);
  const unsigned off = __ballot_sync(kAllLanes, within(s, p.time) && masked(p, b, s));
#pragma unroll
  for (int i = 0; i < kRun; ++i)
    if ((off >> i & 1) != 0) run[i] = {};
}

// Stores those of rows n .. n + kRun - 1 that are rows of the state: few, so by little code.
template <class T>
CK_DEVICE void store_state(const Backward& p, const Quad (&run)[kRun], const Phase& phase, int64_t b, int64_t n,
                           const Work& work, int lane) {
  const int64_t span = p.taps.span(), row = phase.position(n) + span;
  store_pieces(run, lane, work.channels, static_cast<T*>(p.grad_state) + (b * span + row) * p.channels + work.c0,
               phase.dilation * p.channels, row, span, phase.dilation, static_cast<int>(sizeof(T)));
}

// partial_bias of a block: its warps' sums, added in order. `shared`: memory that is no longer needed.
CK_DEVICE void store_bias_sums(const Backward& p, const Quad& sum, float* shared, int64_t partial, const Work& work,
                               int lane) {
  __syncthreads();
  store_quad(shared + threadIdx.x / 32 * kLaneRow + lane * kQuad, sum);
  __syncthreads();
  if (threadIdx.x >= work.channels) return;
  float total = 0;
  for (int w = 0; w < kStreamWarps; ++w) total += shared[w * kLaneRow + threadIdx.x];
  static_cast<float*>(p.partial_bias)[partial * p.channels + work.c0 + threadIdx.x] = total;
}

}  // namespace ck::cuda
