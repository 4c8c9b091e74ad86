#define CK_TYPE ck::f16
#include "csrc/cuda/attention/instantiate/warpgroup.inc.cuh"
