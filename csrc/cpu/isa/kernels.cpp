// The table of the entry points.
#include "csrc/cpu/isa/kernels.h"

namespace ck::cpu::CK_ISA {

#define CK_NAME_OF(isa) #isa
#define CK_NAME(isa) CK_NAME_OF(isa)

const Kernels kKernels = {CK_NAME(CK_ISA), conv_forward,      conv_backward,
                          conv_step,       attention_forward, attention_backward};

}  // namespace ck::cpu::CK_ISA
