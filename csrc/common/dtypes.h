// Storage types. Arithmetic is done in float, for double in double.
#pragma once

#include <cstdint>

namespace ck {

enum class Dtype : int8_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

inline constexpr int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

}  // namespace ck
