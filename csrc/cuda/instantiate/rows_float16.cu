#define CK_TYPE ck::f16
#include "rows.inc.cuh"
