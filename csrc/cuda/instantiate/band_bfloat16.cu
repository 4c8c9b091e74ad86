#define CK_TYPE ck::bf16
#include "band.inc.cuh"
