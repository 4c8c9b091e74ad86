// The table of the entry points.
#include "csrc/cpu/isa/kernels.h"

namespace ck::cpu::CK_ISA {

#define CK_NAME_OF(isa) #isa
#define CK_NAME(isa) CK_NAME_OF(isa)

const Kernels kKernels = {CK_NAME(CK_ISA), forward, backward, shift_state, attention, attention_backward};

}  // namespace ck::cpu::CK_ISA
