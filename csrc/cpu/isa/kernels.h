// The entry points of one instruction set, CK_ISA. CMake compiles the files of this folder once for each.
#pragma once

#include "csrc/cpu/kernels.h"

namespace ck::cpu::CK_ISA {

const char* forward(const Forward& p);
const char* backward(const Backward& p);
const char* shift_state(const Forward& p, void* state);
const char* attention(const AttentionForward& p);
const char* attention_backward(const AttentionBackward& p);

extern const Kernels kKernels;

}  // namespace ck::cpu::CK_ISA
