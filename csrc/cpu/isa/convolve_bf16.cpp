// The tiles of the convolution for bfloat16: rows that are converted first, and rows that are read in place.
#include "csrc/cpu/conv/convolve_tiles.h"

namespace ck::cpu::CK_ISA {

CK_INSTANTIATE_CONVOLVE(Converted<bf16>);
#if CK_VECTOR_BYTES > 16
CK_INSTANTIATE_CONVOLVE(Lanes<bf16>);
#endif

}  // namespace ck::cpu::CK_ISA
