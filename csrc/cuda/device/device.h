// What the host knows of a GPU.
#pragma once

#include <cstdint>

namespace ck::cuda {

// A cudaStream_t, spelled without CUDA's headers.
using Stream = void*;

// No block takes more shared memory, wherever it runs: what compute capability 8.0 has, less a rest. 8.6, 8.9 and
// 12.x have 99 KB, and fewer kernels that fit.
constexpr int64_t kBlockMemory = 160 << 10;

// By default, one on which everything fits.
struct Device {
  int64_t multiprocessors = 132;
  int64_t block_memory = kBlockMemory;  // bytes of shared memory that a block may ask for, at most kBlockMemory
  int64_t memory = 164 << 10;           // and of all blocks on a multiprocessor
};

Device current_device();

}  // namespace ck::cuda
