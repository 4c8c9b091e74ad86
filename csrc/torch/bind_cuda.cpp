// The CUDA operators, registered through torch's stable C interface. No device code. With CK_SIMT the same kernels run
// on the host, and the operators take CPU tensors.
#include "csrc/cuda/attention/families.h"
#include "csrc/cuda/conv/families.h"
#include "csrc/torch/operators.h"

#if !defined(CK_SIMT)
#include <torch/csrc/stable/accelerator.h>
#endif

namespace {

using namespace ck::binding;

void check_status(const char* status) {
  if (status != nullptr) throw std::runtime_error(std::string("convkernels cuda: ") + status);
}

// The device of x is the current one while this lives. Offsets and seeds are not read on the host, which would have to
// wait for the device.
class Cuda {
 public:
  using Forward = ck::cuda::Forward;
  using Backward = ck::cuda::Backward;
  using Step = ck::cuda::Step;
  using AttentionForward = ck::cuda::AttentionForward;
  using AttentionBackward = ck::cuda::AttentionBackward;

#if defined(CK_SIMT)
  Cuda(const Tensor&, const char*) {}
#else
  Cuda(const Tensor& x, const char* argument) : device(device_of(x, argument)), guard_(device.index) {}
#endif

  template <class P>
  void set_seed(P& p, const Tensor& seed) const {
    p.seed = static_cast<const int64_t*>(seed.const_data_ptr());
    p.drop_below = ck::drop_threshold(p.dropout);
    p.keep_scale = p.dropout < 1.0 ? 1.0 / (1.0 - p.dropout) : 0.0;
  }

  void set_offsets(ck::cuda::Problem& p, const Tensor& tensor, const View& cu_seqlens) {
    p.offsets = offsets_.data(device, tensor);
    p.wide_offsets = cu_seqlens.type == ScalarType::Long;
  }

  void set_offsets(ck::cuda::Attention& p, const Tensor& of_queries, const Tensor& of_keys) {
    const ScalarType query_type = View(of_queries).type, key_type = View(of_keys).type;
    require(query_type == ScalarType::Int || query_type == ScalarType::Long, "cu_seqlens_q", "dtype int32 or int64");
    require(key_type == ScalarType::Int || key_type == ScalarType::Long, "cu_seqlens_k", "dtype int32 or int64");
    p.query_offsets = offsets_.data(device, of_queries);
    p.key_offsets = key_offsets_.data(device, of_keys);
    p.wide_query_offsets = query_type == ScalarType::Long;
    p.wide_key_offsets = key_type == ScalarType::Long;
  }

  void forward(Forward& p, bool per_batch) const {
    p.per_batch = per_batch;
    check_status(ck::cuda::forward(p, stream()));
  }

  void backward(Backward& p, bool per_batch, const ConvGradTensors&) const {
    p.per_batch = per_batch;
    const auto launch = ck::cuda::prepare(p);
    const Tensor workspace = allocate_bytes(launch.workspace_bytes);
    check_status(ck::cuda::backward(p, launch, workspace.mutable_data_ptr(), stream()));
  }

  void step(Step& p, const Tensor&) const { check_status(ck::cuda::step(p, stream())); }

  void attention(AttentionForward& p) const {
    const auto launch = ck::cuda::prepare(p);
    const Tensor workspace = allocate_bytes(launch.workspace_bytes);
    check_status(ck::cuda::attention_forward(p, launch, workspace.mutable_data_ptr(), stream()));
  }

  void attention_backward(AttentionBackward& p) const {
    const auto launch = ck::cuda::prepare(p);
    const Tensor workspace = allocate_bytes(launch.workspace_bytes);
    check_status(ck::cuda::attention_backward(p, launch, workspace.mutable_data_ptr(), stream()));
  }

  Device device;

 private:
  Tensor allocate_bytes(int64_t bytes) const { return allocate(device, {bytes}, ScalarType::Byte); }

#if defined(CK_SIMT)
  ck::cuda::Stream stream() const { return nullptr; }
#else
  ck::cuda::Stream stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index, &stream));
    return stream;
  }

  static Device device_of(const Tensor& x, const char* argument) {
    const Device device = Device::of(x);
    require(device.type == aoti_torch_device_type_cuda(), argument, "a tensor on a CUDA device");
    return device;
  }

  torch::stable::accelerator::DeviceGuard guard_;
#endif
  Contiguous offsets_, key_offsets_;
};

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* convkernels_register(const char* name_space) {
#if defined(CK_SIMT)
  return Operators<Cuda>::register_once(name_space, "CPU", "cuda");
#else
  return Operators<Cuda>::register_once(name_space, "CUDA", "cuda");
#endif
}
