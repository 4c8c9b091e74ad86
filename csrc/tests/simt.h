// What the tests of the simulated launches share.
#pragma once

#include <cstdlib>
#include <string>

#include "csrc/cuda/device/primitives.cuh"
#include "csrc/tests/check.h"

namespace ck::test {

constexpr unsigned kFull = ~0u;

inline void expect_good(const char* status) {
  if (status != nullptr) ck::test::fail("launch", 0, status);
}

inline void expect_failure(const char* status, const std::string& part) {
  const std::string text = status == nullptr ? "success" : status;
  if (text.find(part) == std::string::npos)
    ck::test::fail("launch", 0, "expected a status with '" + part + "', got '" + text + "'");
}

template <class Body>
void for_seeds(Body body) {
  for (int seed = 0; seed < 5; ++seed) {
    setenv("CONVKERNELS_SIMT_SEED", std::to_string(seed).c_str(), 1);
    body();
  }
  unsetenv("CONVKERNELS_SIMT_SEED");
}

}  // namespace ck::test
