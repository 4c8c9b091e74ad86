#include "../families.h"
#include "../primitives.cuh"

namespace ck::cuda {

int64_t multiprocessors() {
#if defined(CK_SIMT)
  return Facts{}.multiprocessors;
#else
  int device = 0, count = 0;
  const bool known = cudaGetDevice(&device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) == cudaSuccess;
  return known ? count : Facts{}.multiprocessors;
#endif
}

}  // namespace ck::cuda
