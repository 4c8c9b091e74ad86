#define CK_TYPE ck::bf16
#include "stream.inc.cuh"
