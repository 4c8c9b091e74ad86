#define CK_ISA avx2
#define CK_VECTOR_BYTES 32
#include "csrc/cpu/kernels.inc.h"

namespace ck::cpu {

extern const Kernels kKernels_avx2;
const Kernels kKernels_avx2 = {"avx2",          avx2::forward,           avx2::backward, avx2::shift_state,
                               avx2::attention, avx2::attention_backward};

}  // namespace ck::cpu
