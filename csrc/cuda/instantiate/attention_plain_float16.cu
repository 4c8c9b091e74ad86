#define CK_TYPE ck::f16
#include "attention_plain.inc.cuh"
