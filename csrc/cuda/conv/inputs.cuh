// What a convolution reads: z, the input after gate, mask and sequence boundaries.
#pragma once

#include "csrc/cuda/conv/problem.h"
#include "csrc/cuda/device/numbers.cuh"

namespace ck::cuda {

// A run of positions that windows do not leave: a batch row, or one packed sequence of it.
struct Sequence {
  int64_t number, begin, end;
  int64_t first;  // where the rows that exist begin: those of the state count

  CK_DEVICE bool contains(int64_t s) const { return s >= begin && s < end; }
};

CK_DEVICE int64_t sequence_offset(const Problem& p, int64_t number) {
  return p.wide_offsets ? static_cast<const int64_t*>(p.offsets)[number]
                        : static_cast<const int32_t*>(p.offsets)[number];
}

constexpr int64_t kUnbounded = INT64_MIN;

CK_DEVICE Sequence numbered_sequence(const Problem& p, int64_t number) {
  const int64_t begin = max(sequence_offset(p, number), int64_t{0});
  return {number, begin, min(sequence_offset(p, number + 1), p.time), p.state == nullptr ? begin : kUnbounded};
}

// The sequence of position t: the last one that begins at or before it, found by bisection. Positions outside the row
// are taken for its first or last. Offsets are not validated on the host; they are clamped to the row.
CK_DEVICE Sequence sequence_of(const Problem& p, int64_t t) {
  if (p.offsets == nullptr) return {0, 0, p.time, p.state == nullptr ? 0 : kUnbounded};
  const int64_t inside = min(max(t, int64_t{0}), p.time - 1);
  int64_t number = 0, above = p.sequences;
  while (above - number > 1) {
    const int64_t middle = (number + above) / 2;
    if (sequence_offset(p, middle) <= inside)
      number = middle;
    else
      above = middle;
  }
  return numbered_sequence(p, number);
}

template <class T>
CK_DEVICE T* at(const Rows& rows, int64_t b, int64_t s, int64_t c) {
  return static_cast<T*>(rows.data) + b * rows.batch + s * rows.time + c * rows.channel;
}

CK_DEVICE bool masked(const Problem& p, int64_t b, int64_t s) {
  return p.mask != nullptr && !p.mask[b * p.mask_batch + s * p.mask_time];
}

// Where position s < sequence.begin lies in a tensor like the state; nullptr if the state does not reach so far back.
template <class T>
CK_DEVICE T* state_at(const Problem& p, void* state, int64_t b, int64_t s, int64_t c, const Sequence& sequence) {
  const int64_t span = p.taps.span(), row = s - sequence.begin + span;
  if (state == nullptr || row < 0) return nullptr;
  return static_cast<T*>(state) + ((b * p.sequences + sequence.number) * span + row) * p.channels + c;
}

// z from x, in place, and the gate.
template <class T, int kCount>
CK_DEVICE void apply_gate(Compute<T> (&z)[kCount], const Compute<T> (&gate)[kCount], Activation activation) {
  with_activation(activation, [&](Activation act) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) z[e] *= activated(gate[e], sigmoid<T>(gate[e]), act);
  });
}

// From d(z) to d(x), in place, and d(gate).
template <class T, int kCount>
CK_DEVICE void gate_gradient(Compute<T> (&dz)[kCount], Compute<T> (&dgate)[kCount], const Compute<T> (&x)[kCount],
                             const Compute<T> (&gate)[kCount], Activation activation) {
  with_activation(activation, [&](Activation act) {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      const Compute<T> open = sigmoid<T>(gate[e]);
      dgate[e] = times_slope(dz[e] * x[e], gate[e], open, act);
      dz[e] *= activated(gate[e], open, act);
    }
  });
}

// z at position s of a row inside the sequence that is not masked, from gates that go through `gates`.
template <class T>
CK_DEVICE Compute<T> gated(const Problem& p, int64_t b, int64_t s, int64_t c, Activation gates) {
  const Compute<T> value = widen(*at<const T>(p.x, b, s, c));
  if (p.gate.data == nullptr) return value;
  const Compute<T> gate = widen(*at<const T>(p.gate, b, s, c));
  return value * activated(gate, sigmoid<T>(gate), gates);
}

// z as windows of the sequence see position s.
template <class T>
CK_DEVICE Compute<T> load_input(const Problem& p, int64_t b, int64_t s, int64_t c, const Sequence& sequence,
                                Activation gates) {
  if (sequence.contains(s)) return masked(p, b, s) ? Compute<T>{0} : gated<T>(p, b, s, c, gates);
  if (s >= sequence.end) return 0;
  const T* const row = state_at<const T>(p, const_cast<void*>(p.state), b, s, c, sequence);
  return row == nullptr ? Compute<T>{0} : widen(*row);
}

// What load_input gives for positions s, s + step, ..., of which `count` are wanted. All are asked for before one is
// waited for.
template <class T, int kCount>
CK_DEVICE void load_inputs(Compute<T> (&z)[kCount], const Problem& p, int64_t b, int64_t s, int64_t step, int64_t count,
                           int64_t c, const Sequence& sequence, Activation gates) {
  // What concerns all of them is asked once, and addresses are moved on.
  T raw[kCount];
  bool inside[kCount];
  const T* const first = at<const T>(p.x, b, s, c);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    inside[k] = k < count && sequence.contains(s + k * step);
    raw[k] = inside[k] ? first[k * (step * p.x.time)] : T{};
  }
  if (p.state != nullptr && s < sequence.begin)
#pragma unroll
    for (int k = 0; k < kCount; ++k)
      if (k < count && s + k * step < sequence.begin) {
        const T* const row = state_at<const T>(p, const_cast<void*>(p.state), b, s + k * step, c, sequence);
        if (row != nullptr) raw[k] = *row;
      }
#pragma unroll
  for (int k = 0; k < kCount; ++k) z[k] = widen(raw[k]);
  if (p.gate.data != nullptr) {
    const T* const gate = at<const T>(p.gate, b, s, c);
#pragma unroll
    for (int k = 0; k < kCount; ++k) raw[k] = inside[k] ? gate[k * (step * p.gate.time)] : T{};
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const Compute<T> value = widen(raw[k]);
      if (inside[k]) z[k] *= activated(value, sigmoid<T>(value), gates);
    }
  }
  if (p.mask != nullptr) {
    const bool* const mask = p.mask + b * p.mask_batch + s * p.mask_time;
#pragma unroll
    for (int k = 0; k < kCount; ++k)
      if (inside[k] && !mask[k * (step * p.mask_time)]) z[k] = 0;
  }
}

// Stores d(loss)/d(x) and d(loss)/d(gate) from d(loss)/d(z) at a position of the row; 0 where it is masked.
template <class T>
CK_DEVICE void store_input_gradient(const Backward& p, int64_t b, int64_t s, int64_t c, Compute<T> dz) {
  const bool off = masked(p, b, s);
  Compute<T> dx = dz, dgate = 0;
  if (off) {
    dx = 0;
  } else if (p.gate.data != nullptr) {
    const Compute<T> gate = widen(*at<const T>(p.gate, b, s, c)), open = sigmoid<T>(gate);
    if (p.grad_gate.data != nullptr)
      dgate = times_slope(dz * widen(*at<const T>(p.x, b, s, c)), gate, open, p.gate_activation);
    dx = dz * activated(gate, open, p.gate_activation);
  }
  if (p.grad_x.data != nullptr) *at<T>(p.grad_x, b, s, c) = narrow<T>(dx);
  if (p.grad_gate.data != nullptr) *at<T>(p.grad_gate, b, s, c) = narrow<T>(dgate);
}

}  // namespace ck::cuda
