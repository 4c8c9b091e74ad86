// From a number known at run time to a type or constant known to the compiler. Every switch ends in an error.
#pragma once

#include "csrc/common/dtypes.h"

namespace ck {

// Calls body with a typed null pointer for the storage type; returns its status.
template <class Body>
const char* with_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat64: return body(static_cast<double*>(nullptr));
    case Dtype::kFloat32: return body(static_cast<float*>(nullptr));
    case Dtype::kBFloat16: return body(static_cast<bf16*>(nullptr));
    case Dtype::kFloat16: return body(static_cast<f16*>(nullptr));
  }
  return "unknown dtype";
}

template <bool B>
struct Bool {
  static constexpr bool value = B;
};

template <class Body>
const char* with_bool(bool flag, const Body& body) {
  return flag ? body(Bool<true>{}) : body(Bool<false>{});
}

}  // namespace ck
