#define CK_TYPE ck::bf16
#include "plain.inc.cuh"
