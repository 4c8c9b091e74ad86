#define CK_TYPE float
#include "csrc/cuda/conv/instantiate/time.inc.cuh"
