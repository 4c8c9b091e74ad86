// The table of the entry points.
#include "csrc/cpu/isa/tiles/kernels.h"

namespace ck::cpu::CK_ISA {

const Kernels kKernels = {CK_NAME,           conv_forward,      conv_backward, CK_BASE::conv_step,
                          attention_forward, attention_backward};

}  // namespace ck::cpu::CK_ISA
