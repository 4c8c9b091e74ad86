#include "../device.h"
#include "../primitives.cuh"

namespace ck::cuda {

Device current_device() {
  Device device;
#if defined(CK_SIMT)
  device.multiprocessors = 1;  // so that blocks walk far, as they do in problems of real size
  device.block_memory = static_cast<int64_t>(simt::shared_memory_limit());
#else
  int current = 0;
  if (cudaGetDevice(&current) != cudaSuccess) return device;
  const auto look = [&](int64_t& value, cudaDeviceAttr attribute) {
    int found = 0;
    if (cudaDeviceGetAttribute(&found, attribute, current) == cudaSuccess) value = found;
  };
  look(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  look(device.block_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  look(device.memory, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
#endif
  if (device.block_memory > kBlockMemory) device.block_memory = kBlockMemory;
  return device;
}

}  // namespace ck::cuda
