// The forward pass of the convolutions, and their steps.
#include "csrc/cpu/conv/forward.h"
#include "csrc/cpu/conv/step.h"
#include "csrc/cpu/isa/kernels.h"

namespace ck::cpu::CK_ISA {

const char* conv_forward(const ConvForward& p) {
  return with_dtype(p.dtype, [&](auto* tag) { return conv_forward_typed<__typeof__(*tag)>(p); });
}

const char* shift_state(const ConvForward& p, void* state) {
  return with_dtype(p.dtype, [&](auto* tag) { return shift_state_typed(p, static_cast<decltype(tag)>(state)); });
}

}  // namespace ck::cpu::CK_ISA
