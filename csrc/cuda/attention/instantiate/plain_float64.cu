#define CK_TYPE double
#include "csrc/cuda/attention/instantiate/plain.inc.cuh"
