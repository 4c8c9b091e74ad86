#define CK_TYPE float
#include "csrc/cuda/attention/instantiate/tensor.inc.cuh"
