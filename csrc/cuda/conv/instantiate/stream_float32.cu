#define CK_TYPE float
#include "csrc/cuda/conv/instantiate/stream.inc.cuh"
