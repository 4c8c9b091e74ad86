// The entry points of CK_ISA, an instruction set with tiles, and of CK_BASE, the one below it, whose kernels it uses
// for everything that tiles do not serve. CMake compiles the files of this folder once for each.
#pragma once

#include "csrc/cpu/kernels.h"
#include "csrc/cpu/tiles.h"

namespace ck::cpu {

namespace CK_BASE {
const char* conv_forward(const ConvForward& p);
const char* conv_backward(const ConvBackward& p);
const char* conv_step(const ConvStep& p);
const char* attention_forward(const AttentionForward& p);
const char* attention_backward(const AttentionBackward& p);
}  // namespace CK_BASE

namespace CK_ISA {
#if defined(__AMX_BF16__)
using Machine = AmxTiles;
#else
using Machine = EmulatedTiles;
#endif

const char* conv_forward(const ConvForward& p);
const char* conv_backward(const ConvBackward& p);
const char* attention_forward(const AttentionForward& p);
const char* attention_backward(const AttentionBackward& p);

extern const Kernels kKernels;
}  // namespace CK_ISA

}  // namespace ck::cpu
