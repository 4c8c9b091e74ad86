#define CK_TYPE ck::bf16
#include "csrc/cuda/attention/instantiate/warpgroup.inc.cuh"
