#define CK_TYPE float
#include "attention_plain.inc.cuh"
