#define CK_TYPE ck::f16
#include "csrc/cuda/conv/instantiate/stream.inc.cuh"
