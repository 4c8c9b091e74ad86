#define CK_TYPE double
#include "csrc/cuda/conv/instantiate/plain.inc.cuh"
