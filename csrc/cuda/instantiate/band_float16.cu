#define CK_TYPE ck::f16
#include "band.inc.cuh"
