#define CK_TYPE ck::f16
#include "plain.inc.cuh"
