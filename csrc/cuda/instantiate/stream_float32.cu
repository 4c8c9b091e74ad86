#define CK_TYPE float
#include "stream.inc.cuh"
