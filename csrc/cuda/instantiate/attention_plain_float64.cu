#define CK_TYPE double
#include "attention_plain.inc.cuh"
