// What a CPU kernel of the convolutions is asked to do.
#pragma once

#include "csrc/common/conv.h"
#include "csrc/cpu/workers.h"

namespace ck::cpu {

struct ConvProblem : ck::Convolution, Workers {
  const int64_t* offsets = nullptr;  // sequences+1 packed offsets, nullptr: every batch row is one sequence
  uint64_t seed = 0;
  int64_t dropout_batch = 0;  // batch coordinate of the first filter in the dropout counter
};

struct ConvForward : ConvProblem {
  Rows y;
  Finish finish;
  bool resident_output = false;  // the pages of y are mapped already
};

struct ConvStep : ConvForward {
  States states;
  Rows old;  // the pool before the step, to be read: where rows continue from each other's states, a copy
};

struct ConvBackward : ConvProblem, Gradients {};

}  // namespace ck::cpu
