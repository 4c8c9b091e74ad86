// The convolutions in bfloat16 on tiles.
#include "csrc/cpu/conv/tiles/blocks.h"
#include "csrc/cpu/isa/tiles/kernels.h"

namespace ck::cpu::CK_ISA {

const char* conv_forward(const ConvForward& p) {
  return bands_serve(p) ? conv_forward_typed<bf16, BandBlocks<Machine>>(p) : CK_BASE::conv_forward(p);
}

const char* conv_backward(const ConvBackward& p) {
  return bands_serve(p) ? conv_backward_typed<bf16, BandBlocks<Machine>>(p) : CK_BASE::conv_backward(p);
}

}  // namespace ck::cpu::CK_ISA
