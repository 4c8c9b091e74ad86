#define CK_TYPE ck::f16
#include "csrc/cuda/conv/instantiate/rows.inc.cuh"
