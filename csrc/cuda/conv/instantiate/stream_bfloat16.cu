#define CK_TYPE ck::bf16
#include "csrc/cuda/conv/instantiate/stream.inc.cuh"
