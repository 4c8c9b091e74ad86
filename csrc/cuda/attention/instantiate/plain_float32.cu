#define CK_TYPE float
#include "csrc/cuda/attention/instantiate/plain.inc.cuh"
