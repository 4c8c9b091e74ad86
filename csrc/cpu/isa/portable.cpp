#define CK_ISA portable
#define CK_VECTOR_BYTES 16
#include "csrc/cpu/kernels.inc.h"

namespace ck::cpu {

extern const Kernels kKernels_portable;
const Kernels kKernels_portable = {"portable",          portable::forward,
                                   portable::backward,  portable::shift_state,
                                   portable::attention, portable::attention_backward};

}  // namespace ck::cpu
