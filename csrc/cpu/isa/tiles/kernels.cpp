// The table of the entry points: those of the instruction set below, but for attention.
#include "csrc/cpu/isa/tiles/kernels.h"

namespace ck::cpu::CK_ISA {

const Kernels kKernels = {CK_NAME,           CK_BASE::conv_forward, CK_BASE::conv_backward, CK_BASE::shift_state,
                          attention_forward, attention_backward};

}  // namespace ck::cpu::CK_ISA
