#define CK_TYPE float
#include "csrc/cuda/conv/instantiate/rows.inc.cuh"
