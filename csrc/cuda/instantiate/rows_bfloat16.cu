#define CK_TYPE ck::bf16
#include "rows.inc.cuh"
