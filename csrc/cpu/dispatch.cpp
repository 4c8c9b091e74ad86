#include "csrc/cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ck::cpu {

namespace portable {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace amx {
extern const Kernels kKernels;
}
namespace amx_emulated {
extern const Kernels kKernels;
}
#endif

namespace {

// Best first, then those that are taken by name alone: that for AMX until it has run on a processor with it, and that
// for tests.
const std::vector<const Kernels*>& table() {
  static const std::vector<const Kernels*> all = {
#if defined(__x86_64__)
      &avx512::kKernels,   &avx2::kKernels,
#endif
      &portable::kKernels,
#if defined(__x86_64__)
      &amx::kKernels,      &amx_emulated::kKernels,
#endif
  };
  return all;
}

// Whether the system lets this process use tiles. Their state is large, so that Linux wants to be asked once.
bool may_use_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = ::syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

const Kernels& choose() {
  const char* wanted = std::getenv("CONVKERNELS_CPU_ISA");
  if (wanted && *wanted) {
    const Kernels& named = kernels_of(wanted, "CONVKERNELS_CPU_ISA");
    if (isa_supported(named.name)) return named;
    std::string message = "CONVKERNELS_CPU_ISA: expected what this machine supports:";
    for (const Kernels* k : table())
      if (isa_supported(k->name)) message += std::string(" ") + k->name;
    throw std::runtime_error(message + ", got '" + wanted + "'");
  }
  for (const Kernels* k : table())  // the portable ones come before those taken by name
    if (isa_supported(k->name)) return *k;
  throw std::runtime_error("no kernels for this machine");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const Kernels& kernels_of(const std::string& name, const char* argument) {
  std::string known;
  for (const Kernels* k : table()) {
    if (name == k->name) return *k;
    known += known.empty() ? k->name : std::string(", ") + k->name;
  }
  throw std::runtime_error(std::string(argument) + ": expected one of " + known + ", got '" + name + "'");
}

const char* active_isa() { return kernels().name; }

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Kernels* k : table()) names.emplace_back(k->name);
  return names;
}

bool isa_supported(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (name == "amx")
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && isa_supported("avx512") &&
           may_use_tiles();
  if (name == "amx-emulated") return isa_supported("avx2");
  if (name == "avx512") {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bf16") && isa_supported("avx2");
  }
  if (name == "avx2")
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return name == "portable";
}

}  // namespace ck::cpu
