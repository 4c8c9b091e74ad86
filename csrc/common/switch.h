// From a number known at run time to a type or constant known to the compiler. Every switch ends in an error.
#pragma once

#include <type_traits>

#include "csrc/common/dtypes.h"

namespace ck {

template <class T, class Body>
inline __attribute__((always_inline)) const char* status_of(const Body& body) {
  if constexpr (std::is_void_v<decltype(body(static_cast<T*>(nullptr)))>) {
    body(static_cast<T*>(nullptr));
    return nullptr;
  } else {
    return body(static_cast<T*>(nullptr));
  }
}

// Calls body with a typed null pointer for the storage type; returns its status, nullptr if it has none.
template <class Body>
inline __attribute__((always_inline)) const char* with_dtype(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat64: return status_of<double>(body);
    case Dtype::kFloat32: return status_of<float>(body);
    case Dtype::kBFloat16: return status_of<bf16>(body);
    case Dtype::kFloat16: return status_of<f16>(body);
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
