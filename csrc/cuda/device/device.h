// What host code knows of a GPU, without CUDA's headers.
#pragma once

#include <cstdint>

namespace ck::cuda {

// A cudaStream_t.
using Stream = void*;

// What a thread reads or writes at a time, at most.
constexpr int kVectorBytes = 16;

// The shared memory of a block with compute capability 8.0, less a rest. 8.6, 8.9 and 12.x have 99 KB, and fewer
// kernels that fit; 9.0 and 10.0 have 227.
constexpr int64_t kBlockMemory = 160 << 10;

// By default, one on which everything fits.
struct Device {
  int64_t multiprocessors = 132;
  int64_t block_memory = 227 << 10;  // bytes of shared memory that a block may ask for
  int64_t memory = 228 << 10;        // and of all blocks on a multiprocessor
  bool bulk_copies = true;           // compute capability 9.0 and up, and kernels compiled for it
  bool warpgroups = true;            // compute capability 9.0, and kernels compiled for sm_90a
};

Device current_device();

}  // namespace ck::cuda
