#define CK_TYPE float
#include "rows.inc.cuh"
