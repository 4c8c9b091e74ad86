#define CK_TYPE float
#include "plain.inc.cuh"
