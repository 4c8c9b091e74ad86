#define CK_TYPE ck::bf16
#include "attention_tensor.inc.cuh"
