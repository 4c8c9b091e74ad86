// The entry points of one instruction set, CK_ISA. CMake compiles the files of this folder once for each.
#pragma once

#include "csrc/cpu/kernels.h"

namespace ck::cpu::CK_ISA {

const char* conv_forward(const ConvForward& p);
const char* conv_backward(const ConvBackward& p);
const char* conv_step(const ConvStep& p);
const char* attention_forward(const AttentionForward& p);
const char* attention_backward(const AttentionBackward& p);

extern const Kernels kKernels;

}  // namespace ck::cpu::CK_ISA
