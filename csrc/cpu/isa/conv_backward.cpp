// The backward pass of the convolutions.
#include "csrc/cpu/conv/backward.h"
#include "csrc/cpu/isa/kernels.h"

namespace ck::cpu::CK_ISA {

const char* conv_backward(const ConvBackward& p) {
  return with_dtype(p.dtype, [&](auto* tag) { return conv_backward_typed<__typeof__(*tag)>(p); });
}

}  // namespace ck::cpu::CK_ISA
