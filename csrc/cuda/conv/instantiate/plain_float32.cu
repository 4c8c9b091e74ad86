#define CK_TYPE float
#include "csrc/cuda/conv/instantiate/plain.inc.cuh"
