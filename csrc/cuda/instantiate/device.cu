#include "../families.h"
#include "../primitives.cuh"

namespace ck::cuda {

int64_t multiprocessors() {
#if defined(CK_SIMT)
  return 1;  // so that blocks walk far, as they do in problems of real size
#else
  int device = 0, count = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
  return known ? count : Facts{}.multiprocessors;
#endif
}

}  // namespace ck::cuda
