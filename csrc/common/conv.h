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
  int64_t sequences = 1;               // packed sequences of each batch row
  const void* state = nullptr;         // [batch * sequences, span, channels] contiguous: inputs before position 0
  const int64_t* state_row = nullptr;  // which row of state a sequence continues from, nullptr: its own
  const int64_t* position = nullptr;   // inputs consumed before position 0, per batch row; nullptr: at least span
  int64_t position_stride = 0;

  const void* weight = nullptr;  // [batch, time, heads, taps]; batch and time stride 0: one filter for all
  int64_t weight_batch = 0, weight_time = 0, weight_head = 0, weight_tap = 0;
  bool per_position = false;  // the filter depends on the position (weight_time != 0)
  bool softmax = false, renormalize = false;
  double dropout = 0.0;
  const void* bias = nullptr;  // [channels], contiguous
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
