#define CK_TYPE double
#include "plain.inc.cuh"
