// The kernels of one instruction set.
#pragma once

#include "csrc/cpu/attention/problem.h"
#include "csrc/cpu/conv/problem.h"

namespace ck::cpu {

// Entry points of one instruction set. They return nullptr, or the reason why they could not run.
struct Kernels {
  const char* name;
  const char* (*conv_forward)(const ConvForward&);
  const char* (*conv_backward)(const ConvBackward&);
  const char* (*conv_step)(const ConvStep&);
  const char* (*attention_forward)(const AttentionForward&);
  const char* (*attention_backward)(const AttentionBackward&);
};

}  // namespace ck::cpu
