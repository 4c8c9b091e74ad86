// From tensors to pointers and strides, through torch's stable C interface: what the operator libraries share.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/common/conv.h"
#include "csrc/torch/memory.h"

// The name that torch 2.10 to 2.12 have for it.
#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace ck::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

inline void require(bool condition, const char* argument, const char* expected) {
  if (!condition) throw std::runtime_error(std::string("argument '") + argument + "': expected " + expected);
}

inline Dtype float_dtype(ScalarType type, const char* argument) {
  switch (type) {
    case ScalarType::Double: return Dtype::kFloat64;
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    default: break;
  }
  throw std::runtime_error(std::string("argument '") + argument +
                           "': expected dtype float64, float32, bfloat16 or float16");
}

inline const int32_t kCpu = aoti_torch_device_type_cpu();

// Where a tensor is, and results are allocated.
struct Device {
  int32_t type = kCpu, index = 0;

  static Device of(const Tensor& t) {
    Device device;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device.type));
    if (device.type != kCpu) STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &device.index));
    return device;
  }

  std::string name() const {
    if (type == kCpu) return "cpu";
    return type == aoti_torch_device_type_cuda() ? "cuda:" + std::to_string(index) : "another kind of device";
  }
};

// `t`, which has to be where the call computes: dispatch looks at one device of all that the arguments are on.
inline const Tensor& checked(const Device& device, const Tensor& t, const char* argument) {
  const Device at = Device::of(t);
  if (at.type != device.type || at.index != device.index)
    throw std::runtime_error(std::string("argument '") + argument + "': expected a tensor on " + device.name() +
                             ", where this call computes, got one on " + at.name());
  return t;
}

// What the stable interface tells about a tensor, asked once: every question is a call into torch.
struct View {
  View(const Device& device, const Tensor& t, const char* argument) : View(checked(device, t, argument)) {}

  // A result, or an argument that has been checked.
  explicit View(const Tensor& t)
      : data(t.mutable_data_ptr()),
        dim(t.dim()),
        size(t.sizes().data()),
        stride(t.strides().data()),
        type(t.scalar_type()) {}

  void* data;
  int64_t dim;
  const int64_t *size, *stride;
  ScalarType type;

  // The stride of a dimension that is not the last, 0 if nothing follows its first element: how it is written there is
  // no reason to take a tensor for misaligned.
  int64_t step(int64_t i) const { return size[i] <= 1 ? 0 : stride[i]; }
};

// A [batch, time, channels] tensor of x's shape and dtype.
inline Rows rows_like(const View& t, const View& x, const char* argument) {
  require(t.dim == 3 && t.type == x.type, argument, "three dimensions and the dtype of x");
  require(t.size[0] == x.size[0] && t.size[1] == x.size[1] && t.size[2] == x.size[2], argument, "the shape of x");
  return {t.data, t.step(0), t.step(1), t.stride[2]};
}

// Whether no two elements share memory.
inline bool has_own_memory(const View& t) {
  std::vector<std::pair<int64_t, int64_t>> steps;
  for (int64_t i = 0; i < t.dim; ++i) {
    if (t.size[i] == 0) return true;
    if (t.size[i] > 1) steps.emplace_back(t.stride[i], t.size[i]);
  }
  std::sort(steps.begin(), steps.end());
  int64_t room = 1;
  for (const auto& [stride, size] : steps) {
    if (stride < room) return false;
    room += stride * (size - 1);
  }
  return true;
}

inline void poison(const Device& device, const Tensor& t) {
  if (device.type == kCpu) ck::poison(t.mutable_data_ptr(), static_cast<size_t>(t.numel()) * t.element_size());
}

// An uninitialised tensor. torch's own empty_like and new_empty look their operators up by name, which takes longer
// than everything else in a small call.
inline Tensor allocate(const Device& device, int64_t dim, const int64_t* size, const int64_t* stride, ScalarType type) {
  AtenTensorHandle handle;
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, size, stride, dtype, device.type, device.index, &handle));
  Tensor t(handle);
  poison(device, t);
  return t;
}

inline Tensor allocate(const Device& device, std::initializer_list<int64_t> size, ScalarType type) {
  int64_t stride[4] = {1, 1, 1, 1};
  for (size_t i = size.size() - 1; i > 0; --i) stride[i - 1] = stride[i] * std::max<int64_t>(1, size.begin()[i]);
  return allocate(device, static_cast<int64_t>(size.size()), size.begin(), stride, type);
}

inline Tensor allocate_contiguous(const Device& device, const View& t) {
  std::vector<int64_t> stride(static_cast<size_t>(t.dim), 1);
  for (int64_t i = t.dim - 1; i > 0; --i) stride[i - 1] = stride[i] * std::max<int64_t>(1, t.size[i]);
  return allocate(device, t.dim, t.size, stride.data(), t.type);
}

// An uninitialised tensor in the layout of t if that is dense, as torch::empty_like chooses it.
inline Tensor allocate_like(const Device& device, const Tensor& tensor, const View& t) {
  // Dense in some order of the dimensions: each stride is the product of the sizes of those inside it.
  int64_t expected = 1;
  bool used[4] = {};
  for (int64_t i = 0; i < t.dim; ++i) used[i] = t.size[i] == 1;
  for (int64_t n = 0; n < t.dim; ++n) {
    int64_t next = -1;
    for (int64_t i = t.dim - 1; i >= 0 && next < 0; --i)
      if (!used[i] && t.stride[i] == expected && t.size[i] > 0) next = i;
    if (next < 0) break;
    used[next] = true;
    expected *= t.size[next];
  }
  bool dense = true;
  for (int64_t i = 0; i < t.dim; ++i) dense = dense && used[i];
  if (dense) return allocate(device, t.dim, t.size, t.stride, t.type);
  Tensor like = torch::stable::empty_like(tensor);
  poison(device, like);
  return like;
}

// A tensor's elements one after the other. A copy is kept where they do not lie so already.
class Contiguous {
 public:
  const void* data(const Device& device, const Tensor& t) {
    if (t.is_contiguous()) return t.const_data_ptr();
    copy_ = allocate_contiguous(device, View(t));
    torch::stable::copy_(*copy_, t);
    return copy_->const_data_ptr();
  }

 private:
  std::optional<Tensor> copy_;
};

}  // namespace ck::binding
