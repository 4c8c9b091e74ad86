// What a CPU kernel is asked to do: plain pointers, sizes and strides (in elements), no torch.
#pragma once

#include <cstdint>

#include "../common/dtypes.h"
#include "../common/taps.h"

namespace ck::cpu {

// CONVKERNELS_POISON=1: memory is filled with NaN when it is allocated, so that tests see what is read or left
// unwritten.
bool poisoned();

// A [batch, time, channel] tensor with any strides.
struct Rows {
  void* data = nullptr;
  int64_t batch = 0, time = 0, channel = 0;
};

// Runs body(begin, end, context) over disjoint ranges that cover [0, n), possibly on several threads.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t n, ParallelBody body, void* context);

// One tap_conv or tap_grad call. Equation: docs/semantics.md.
struct Problem {
  int64_t batch = 0, time = 0, channels = 0, heads = 0;
  Taps taps{};
  Dtype dtype = Dtype::kFloat32, weight_dtype = Dtype::kFloat32, bias_dtype = Dtype::kFloat32;

  Rows x, gate;                // gate.data == nullptr: no gate
  const bool* mask = nullptr;  // false: the position reads as 0
  int64_t mask_batch = 0, mask_time = 0;
  const int64_t* offsets = nullptr;  // sequences+1 packed offsets, nullptr: every batch row is one sequence
  int64_t sequences = 1;
  const void* state = nullptr;         // [batch * sequences, span, channels] contiguous: inputs before position 0
  const int64_t* state_row = nullptr;  // which row of state a sequence continues from, nullptr: its own
  const int64_t* position = nullptr;   // inputs consumed before position 0, per batch row; nullptr: at least span
  int64_t position_stride = 0;

  const void* weight = nullptr;  // [batch, time, heads, taps]; batch and time stride 0: one filter for all
  int64_t weight_batch = 0, weight_time = 0, weight_head = 0, weight_tap = 0;
  bool per_position = false;  // the filter depends on the position (weight_time != 0)
  bool softmax = false, renormalize = false;
  double dropout = 0.0;
  uint64_t seed = 0;
  int64_t dropout_batch = 0;   // batch coordinate of the first filter in the dropout counter
  const void* bias = nullptr;  // [channels], contiguous

  ParallelFor parallel_for = nullptr;
  int64_t threads = 1;
};

struct Forward : Problem {
  Rows y;
  bool resident_output = false;  // the pages of y are mapped already
};

struct Backward : Problem {
  Rows grad;                    // d(loss)/d(y)
  Rows grad_x, grad_gate;       // data == nullptr: not wanted (grad_gate needs grad_x's pass, not its output)
  void* grad_weight = nullptr;  // contiguous, weight's own shape: [heads, taps] or [batch, time, heads, taps]
  void* grad_bias = nullptr;    // [channels], bias_dtype
  void* grad_state = nullptr;   // like state
};

// Entry points of one instruction set. They return nullptr, or the reason why they could not run.
struct Kernels {
  const char* name;
  const char* (*forward)(const Forward&);
  const char* (*backward)(const Backward&);
  // After a step of one position: drops the oldest row of each state and appends the (gated) x.
  const char* (*shift_state)(const Forward&, void* state);
};

}  // namespace ck::cpu
