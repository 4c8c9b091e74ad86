// The widest kernels, compiled for any machine: vectors of 64 bytes made of whatever this one has. The tiles, loops and
// tails of AVX-512 thus run in every test, also where its instructions do not exist.
#define CK_ISA wide
#define CK_VECTOR_BYTES 64
#include "csrc/cpu/kernels.inc.h"

namespace ck::cpu {

extern const Kernels kKernels_wide;
const Kernels kKernels_wide = {"wide",          wide::forward,           wide::backward, wide::shift_state,
                               wide::attention, wide::attention_backward};

}  // namespace ck::cpu
