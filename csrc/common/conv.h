// What a kernel is asked to do: plain pointers, sizes and strides (in elements), no torch. Every backend in csrc/ adds
// what only it needs.
#pragma once

#include <cstdint>

#include "csrc/common/dtypes.h"
#include "csrc/common/taps.h"

namespace ck {

// A [batch, time, channel] tensor with any strides.
struct Rows {
  void* data = nullptr;
  int64_t batch = 0, time = 0, channel = 0;
};

// What gates and results go through; the numbers are those of ACTIVATIONS in convkernels/ops/conv/schema.py.
enum class Activation : int64_t { kNone, kSigmoid, kSilu };

// What becomes of the sums a of a forward pass; data == nullptr: there is none.
//   tap_conv:             y = residual + out_gate * act(a)
//   tap_activation_grad:  y = grad * out_gate * act'(a)  and  grad_out_gate = grad * act(a)
struct Finish {
  Activation activation = Activation::kNone;
  Rows out_gate, residual;
  Rows grad, grad_out_gate;

  CK_HD bool differentiates() const { return grad.data != nullptr; }
  // Whether y is anything but the sum.
  CK_HD bool any() const {
    return activation != Activation::kNone || out_gate.data != nullptr || residual.data != nullptr || differentiates();
  }
};

// One tap_conv, tap_activation_grad or tap_grad call. Equation: docs/semantics.md.
struct Convolution {
  int64_t batch = 0, time = 0, channels = 0, heads = 0;
  Taps taps{};
  Dtype dtype = Dtype::kFloat32, weight_dtype = Dtype::kFloat32, bias_dtype = Dtype::kFloat32;

  Rows x, gate;  // gate.data == nullptr: no gate
  Activation gate_activation = Activation::kSigmoid;
  const bool* mask = nullptr;  // false: the position reads as 0
  int64_t mask_batch = 0, mask_time = 0;
  int64_t sequences = 1;        // packed sequences of each batch row
  const void* state = nullptr;  // [batch * sequences, span, channels] contiguous: inputs before position 0

  const void* weight = nullptr;  // [batch, time, heads, taps]; batch and time stride 0: one filter for all
  int64_t weight_batch = 0, weight_time = 0, weight_head = 0, weight_tap = 0;
  bool per_position = false;  // the filter depends on the position (weight_time != 0)
  bool softmax = false, renormalize = false;
  double dropout = 0.0;
  const void* bias = nullptr;  // [channels], contiguous
};

// Integers that are given one by one.
struct Indices {
  const void* data = nullptr;  // nullptr: none are given
  int64_t stride = 0;
  bool wide = true;  // int64, otherwise int32

  CK_HD int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i * stride] : static_cast<const int32_t*>(data)[i * stride];
  }
  CK_HD int64_t get(int64_t i, int64_t otherwise) const { return data == nullptr ? otherwise : (*this)[i]; }
};

// What the sequences of a tap_step continue from and update: a tensor [slots, width, channels] with any strides. Every
// batch row is a sequence, or every packed sequence of the one batch row. Its positions are numbered from the first of
// x on; after n of them row `width - n + s` of its slot holds position s.
struct States {
  Rows pool;  // batch: from slot to slot
  int64_t slots = 0, width = 0, sequences = 0;
  // Per sequence:
  Indices slot;      // by default its own number. Negative: it has none, and its y is 0
  Indices source;    // the slot to read, by default the same
  Indices accepted;  // of n newest rows of the old state so many count, where n positions follow; by default all
  Indices position;  // inputs before position 0; by default as many as are read
  // States on the way: that before position save_at of the batch row is left in save_slot, where that is not negative.
  // At a boundary it is that of the sequence which ends there.
  int64_t saves = 0;
  Indices save_at, save_slot;

  // Row of the state after n positions that holds position s.
  CK_HD int64_t row(int64_t n, int64_t s) const { return width - n + s; }
  // Row of the state before n positions of a sequence that holds position s < 0. Where it is negative, the state after
  // them has 0.
  CK_HD int64_t old_row(int64_t sequence, int64_t n, int64_t s) const { return row(n, s) + accepted.get(sequence, n); }
};

// Where the gradients go; data == nullptr: not wanted.
struct Gradients {
  Rows grad;                    // d(loss)/d(y), the input
  Rows grad_x, grad_gate;       // grad_gate needs grad_x's pass, not its output
  void* grad_weight = nullptr;  // contiguous, weight's own shape: [heads, taps] or [batch, time, heads, taps]
  void* grad_bias = nullptr;    // [channels], bias_dtype
  void* grad_state = nullptr;   // like state
};

}  // namespace ck
