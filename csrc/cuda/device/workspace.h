// Cuts a workspace into arrays.
#pragma once

#include "csrc/common/dtypes.h"
#include "csrc/cuda/device/device.h"

namespace ck::cuda {

// Takes `count` numbers of the accumulation type from a workspace that may not exist yet.
class Rooms {
 public:
  Rooms(void* begin, Dtype dtype) : at_(static_cast<char*>(begin)), size_(dtype == Dtype::kFloat64 ? 8 : 4) {}

  void* take(int64_t count) {
    void* const room = at_ == nullptr ? nullptr : at_ + used_;
    used_ += (count * size_ + kVectorBytes - 1) / kVectorBytes * kVectorBytes;
    return room;
  }
  int64_t used() const { return used_; }

 private:
  char* at_;
  int64_t size_, used_ = 0;
};

}  // namespace ck::cuda
