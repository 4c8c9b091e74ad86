// Picks the kernels that this machine can run.
#pragma once

#include <string>
#include <vector>

#include "csrc/cpu/kernels.h"

namespace ck::cpu {

// The kernels of the best instruction set of this machine, or of the one that CONVKERNELS_CPU_ISA names. Throws
// std::runtime_error if that one is not compiled in or not supported here.
const Kernels& kernels();

// The kernels of one instruction set by name. Throws std::runtime_error, which begins with `argument`, if it is not
// compiled in.
const Kernels& kernels_of(const std::string& name, const char* argument = "instruction set");

const char* active_isa();
std::vector<std::string> compiled_isas();
bool isa_supported(const std::string& name);

}  // namespace ck::cpu
