#define CK_TYPE ck::bf16
#include "time.inc.cuh"
