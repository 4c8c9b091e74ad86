#define CK_TYPE ck::f16
#include "stream.inc.cuh"
