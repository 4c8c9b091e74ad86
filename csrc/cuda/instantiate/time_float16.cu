#define CK_TYPE ck::f16
#include "time.inc.cuh"
