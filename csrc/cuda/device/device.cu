#include "csrc/cuda/device/device.h"

#include <map>
#include <mutex>
#include <utility>

#include "csrc/cuda/device/warpgroup.cuh"

namespace ck::cuda {

#if !defined(CK_SIMT)
#if defined(CK_OLDEST_PTX)
#error "device.cu: expected PTX of its own, from which it tells what has been compiled"
#endif
// A kernel like those of files that have PTX of their own, which fewer GPUs can load than the others: with static
// shared memory where kernels for warpgroups have been compiled.
CK_GLOBAL(32, 1) void sample() {
  if constexpr (kWarpgroups) {
    CK_SHARED(volatile int, memory, 1);
    memory[0] = 0;
  }
}

// The limit is one for all threads of the host and only ever raised: lowered to what a launch needs, it could fall
// between another thread's setting and launch.
cudaError_t allow_shared_memory(const void* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, size_t> limits;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::lock_guard lock(mutex);
  size_t& limit = limits[{device, kernel}];
  if (bytes <= limit) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) limit = bytes;
  return error;
}
#endif

Device current_device() {
#if defined(CK_SIMT)
  Device device;
  device.multiprocessors = static_cast<int64_t>(simt::multiprocessors());
  device.block_memory = static_cast<int64_t>(simt::shared_memory_limit());
  device.memory = device.block_memory + 1024;
  device.bulk_copies = simt::architecture() >= 90;
  device.warpgroups = simt::architecture() == 90;
#else
  // Every call asks, and mostly for the same one.
  thread_local Device device;
  thread_local int known = -1;
  int current = 0;
  if (cudaGetDevice(&current) != cudaSuccess) return {};
  if (current == known) return device;
  known = current;
  device = {};
  const auto look = [&](int64_t& value, cudaDeviceAttr attribute) {
    int found = 0;
    if (cudaDeviceGetAttribute(&found, attribute, current) == cudaSuccess) value = found;
  };
  look(device.multiprocessors, cudaDevAttrMultiProcessorCount);
  look(device.block_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  look(device.memory, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  // A driver may have compiled PTX of an older architecture for the device.
  cudaFuncAttributes attributes;
  const bool known_code = cudaFuncGetAttributes(&attributes, sample) == cudaSuccess;
  if (!known_code) cudaGetLastError();  // the first launch says what is wrong
  device.bulk_copies = known_code && attributes.ptxVersion >= 90;
  device.warpgroups = known_code && attributes.binaryVersion == 90 && attributes.sharedSizeBytes > 0;
#endif
  return device;
}

}  // namespace ck::cuda

// For Python, before the first call, since the runtime in this library may need a newer driver than torch's: the CUDA
// versions of driver and runtime, and why no kernel can be loaded on the current device, or nullptr. Nothing is
// launched.
extern "C" __attribute__((visibility("default"))) const char* convkernels_cuda_support(int* driver, int* runtime) {
  *driver = *runtime = 0;
#if !defined(CK_SIMT)
  int devices = 0;
  cudaFuncAttributes attributes;
  cudaDriverGetVersion(driver);
  cudaRuntimeGetVersion(runtime);
  cudaError_t error = cudaGetDeviceCount(&devices);  // makes no context, unlike what follows
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, ck::cuda::sample);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return cudaGetErrorString(error);
  }
#endif
  return nullptr;
}
