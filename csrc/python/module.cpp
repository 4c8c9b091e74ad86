// convkernels._C: what this build is. The operators do not come through here, and the package works without it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <vector>

#include "csrc/cpu/dispatch.h"

namespace py = pybind11;

namespace {

std::map<std::string, std::string> compilers() { return {{"c++", CK_CXX_COMPILER}}; }

// The GPU architectures with compiled kernels; this version has no CUDA library.
std::vector<std::string> cuda_archs() { return {}; }

py::dict build_info() {
  py::dict info;
  info["version"] = CK_VERSION;
  info["compilers"] = compilers();
  info["torch_target"] = CK_TORCH_TARGET;
  info["compiled_isas"] = ck::cpu::compiled_isas();
  info["active_isa"] = ck::cpu::active_isa();
  info["cuda_archs"] = cuda_archs();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of convkernels";
  m.attr("version") = CK_VERSION;
  m.attr("compilers") = compilers();
  m.attr("torch_target") = CK_TORCH_TARGET;
  m.attr("cuda_archs") = cuda_archs();
  m.def("compiled_isas", &ck::cpu::compiled_isas, "Names of the CPU instruction sets with compiled kernels");
  m.def("active_isa", &ck::cpu::active_isa, "The instruction set the CPU kernels use on this machine");
  m.def("isa_supported", &ck::cpu::isa_supported, py::arg("name"), "Whether this machine can run the named kernels");
  m.def("build_info", &build_info, "All of the above in one dictionary");
}
