// The forward pass of the convolutions, and their steps.
#include "csrc/cpu/conv/forward.h"
#include "csrc/cpu/conv/step.h"
#include "csrc/cpu/isa/kernels.h"

namespace ck::cpu::CK_ISA {

const char* conv_forward(const ConvForward& p) {
  return with_dtype(p.dtype, [&](auto* tag) { return conv_forward_typed<__typeof__(*tag)>(p); });
}

const char* conv_step(const ConvStep& p) {
  return with_dtype(p.dtype, [&](auto* tag) { return conv_step_typed<__typeof__(*tag)>(p); });
}

}  // namespace ck::cpu::CK_ISA
