#define CK_TYPE float
#include "time.inc.cuh"
