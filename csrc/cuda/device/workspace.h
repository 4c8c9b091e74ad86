// Cuts a workspace into arrays.
#pragma once

#include "csrc/common/dtypes.h"
#include "csrc/cuda/device/device.h"

namespace ck::cuda {

// Takes `count` numbers of the accumulation type from a workspace that may not exist yet.
class Workspace {
 public:
  Workspace(void* begin, Dtype dtype) : at_(static_cast<char*>(begin)), size_(dtype == Dtype::kFloat64 ? 8 : 4) {}

  void* take(int64_t count) {
    void* const data = at_ == nullptr ? nullptr : at_ + bytes_;
    bytes_ += (count * size_ + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
    return data;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* at_;
  int64_t size_, bytes_ = 0;
};

}  // namespace ck::cuda
