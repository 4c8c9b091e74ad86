#include "csrc/common/poison.h"

#include <cstdlib>
#include <string>

namespace ck {

bool poisoned() {
  static const bool wanted = [] {
    const char* value = std::getenv("CONVKERNELS_POISON");
    return value != nullptr && std::string(value) == "1";
  }();
  return wanted;
}

}  // namespace ck
