// convkernels._C: what this build is, and the launch plans of its CUDA kernels. The operators do not come through here,
// and the package works without it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

#include "csrc/cpu/dispatch.h"
#include "csrc/cuda/attention/plan.h"
#include "csrc/cuda/conv/plan.h"

namespace py = pybind11;

namespace {

std::map<std::string, std::string> compilers() {
  std::map<std::string, std::string> found = {{"c++", CK_CXX_COMPILER}};
#if defined(CK_CUDA_COMPILER)
  found["cuda"] = CK_CUDA_COMPILER;
#endif
  return found;
}

// The GPU architectures with compiled kernels; "+PTX" where the driver can compile them for newer ones.
std::vector<std::string> cuda_archs() {
  std::vector<std::string> names;
#if defined(CK_CUDA_ARCHS)
  std::istringstream list(CK_CUDA_ARCHS);
  for (std::string name; std::getline(list, name, ',');) names.push_back(name);
#endif
  return names;
}

// The fields of a structure by name, one line each: what Python may say, and what it is told.
template <class Field>
void each_field(ck::cuda::Facts& facts, Field&& field) {
  field("batch", facts.batch);
  field("time", facts.time);
  field("channels", facts.channels);
  field("heads", facts.heads);
  field("taps", facts.taps);
  field("dilation", facts.dilation);
  field("dtype", facts.dtype);
  field("per_position", facts.per_position);
  field("renormalize", facts.renormalize);
  field("per_batch", facts.per_batch);
  field("gate", facts.gate);
  field("packed", facts.packed);
  field("state", facts.state);
  field("channel_bytes", facts.channel_bytes);
  field("time_bytes", facts.time_bytes);
  field("weight_bytes", facts.weight_bytes);
  field("multiprocessors", facts.device.multiprocessors);
  field("block_memory", facts.device.block_memory);
  field("bulk_copies", facts.device.bulk_copies);
}

template <class Field>
void each_field(ck::cuda::Plan& plan, Field&& field) {
  field("family", plan.family);
  field("groups", plan.groups);
  field("shared_bytes", plan.shared_bytes);
  field("lanes", plan.lanes);
  field("units", plan.units);
  field("bulk", plan.bulk);
}

template <class Field>
void each_field(ck::cuda::AttentionFacts& facts, Field&& field) {
  field("batch", facts.batch);
  field("queries", facts.queries);
  field("keys", facts.keys);
  field("heads", facts.heads);
  field("groups", facts.groups);
  field("channels", facts.channels);
  field("rank", facts.rank);
  field("window", facts.window);
  field("sequences", facts.sequences);
  field("dtype", facts.dtype);
  field("packed", facts.packed);
  field("relative", facts.relative);
  field("query_rel", facts.query_rel);
  field("key_rel", facts.key_rel);
  field("low_rank", facts.low_rank);
  field("positive_scale", facts.positive_scale);
  field("boxes", facts.boxes);
  field("multiprocessors", facts.device.multiprocessors);
  field("block_memory", facts.device.block_memory);
  field("warpgroups", facts.device.warpgroups);
}

template <class Field>
void each_field(ck::cuda::AttentionPlan& plan, Field&& field) {
  field("family", plan.family);
  field("channels", plan.channels);
  field("kernel_channels", plan.kernel_channels);
  field("resident", plan.resident);
  field("stages", plan.stages);
  field("key_family", plan.key_family);
  field("key_stages", plan.key_stages);
  field("shared_bytes", plan.shared_bytes);
  field("key_shared_bytes", plan.key_shared_bytes);
  field("strip_pitch", plan.strip_pitch);
  field("grad_pitch", plan.grad_pitch);
  field("query_parts", plan.query_parts);
  field("key_parts", plan.key_parts);
  field("tap_parts", plan.tap_parts);
}

ck::Dtype dtype_of(const std::string& name) {
  if (name == "float64") return ck::Dtype::kFloat64;
  if (name == "float32") return ck::Dtype::kFloat32;
  if (name == "bfloat16") return ck::Dtype::kBFloat16;
  if (name == "float16") return ck::Dtype::kFloat16;
  throw py::value_error("argument 'dtype': expected float64, float32, bfloat16 or float16, got '" + name + "'");
}

// `Facts` from what Python gives by name.
template <class Facts>
Facts facts_from(const char* function, const py::kwargs& given) {
  Facts facts;
  size_t taken = 0;
  each_field(facts, [&](const char* name, auto& value) {
    using Value = std::remove_reference_t<decltype(value)>;
    if (!given.contains(name)) return;
    ++taken;
    if constexpr (std::is_same_v<Value, ck::Dtype>)
      value = dtype_of(given[name].cast<std::string>());
    else
      value = given[name].cast<Value>();
  });
  if (taken != given.size())
    throw py::type_error(std::string(function) + ": a fact that is not a field of the facts in csrc/cuda");
  return facts;
}

template <class Plan>
py::dict to_python(Plan plan) {
  py::dict result;
  each_field(plan, [&](const char* name, auto& value) {
    if constexpr (std::is_enum_v<std::remove_reference_t<decltype(value)>>)
      result[name] = ck::cuda::name_of(value);
    else
      result[name] = value;
  });
  return result;
}

py::dict cuda_plan(bool backward, const py::kwargs& given) {
  const auto facts = facts_from<ck::cuda::Facts>("cuda_plan", given);
  return to_python(backward ? ck::cuda::plan_backward(facts) : ck::cuda::plan_forward(facts));
}

py::dict cuda_attention_plan(bool backward, const py::kwargs& given) {
  return to_python(
      ck::cuda::plan_attention(facts_from<ck::cuda::AttentionFacts>("cuda_attention_plan", given), backward));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of convkernels, and the launch plans of its CUDA kernels";
  m.attr("version") = CK_VERSION;
  m.attr("compilers") = compilers();
  m.attr("torch_target") = CK_TORCH_TARGET;
  m.attr("cuda_archs") = cuda_archs();
  m.def("compiled_isas", &ck::cpu::compiled_isas, "Names of the CPU instruction sets with compiled kernels");
  m.def("active_isa", &ck::cpu::active_isa, "The instruction set the CPU kernels use on this machine");
  m.def("isa_supported", &ck::cpu::isa_supported, py::arg("name"), "Whether this machine can run the named kernels");
  m.def("cuda_plan", &cuda_plan, py::arg("backward"),
        "The launch plan of the CUDA kernels for a problem, given as the fields of Facts in csrc/cuda/conv/plan.h");
  m.def("cuda_attention_plan", &cuda_attention_plan, py::arg("backward"),
        "The same for attention: the fields of AttentionFacts in csrc/cuda/attention/plan.h");
}
