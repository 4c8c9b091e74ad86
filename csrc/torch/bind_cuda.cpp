// The CUDA operators, registered through torch's stable C interface. No device code. With CK_SIMT the same kernels run
// on the host, and the operators take CPU tensors.
#include "csrc/cuda/families.h"
#include "csrc/torch/convolutions.h"

#if !defined(CK_SIMT)
#include <torch/csrc/stable/accelerator.h>
#endif

namespace {

using namespace ck::binding;

// The device of a call, current while this lives, and its current stream. Offsets and seeds stay where they are: to
// read them here would mean to wait for the device.
class Device {
 public:
#if defined(CK_SIMT)
  explicit Device(const Tensor&) : place(Place::cpu()) {}

  ck::cuda::Stream stream() const { return nullptr; }
#else
  explicit Device(const Tensor& x) : place{aoti_torch_device_type_cuda(), index_of(x)}, guard_(place.index) {}

  ck::cuda::Stream stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(place.index, &stream));
    return stream;
  }
#endif

  void set_seed(ck::cuda::Problem& p, const Tensor& seed) const {
    p.seed = static_cast<const int64_t*>(seed.const_data_ptr());
    p.drop_below = ck::drop_threshold(p.dropout);
    p.keep_scale = p.dropout < 1.0 ? 1.0 / (1.0 - p.dropout) : 0.0;
  }

  void set_offsets(ck::cuda::Problem& p, const Tensor& tensor, const View& cu_seqlens) {
    p.offsets = offsets_.data(place, tensor);
    p.wide_offsets = cu_seqlens.type == ScalarType::Long;
  }

  Place place;

 private:
#if !defined(CK_SIMT)
  static int32_t index_of(const Tensor& x) {
    int32_t index = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &index));
    return index;
  }

  torch::stable::accelerator::DeviceGuard guard_;
#endif
  Contiguous offsets_;
};

void check_status(const char* status) {
  if (status != nullptr) throw std::runtime_error(std::string("convkernels cuda: ") + status);
}

Tensor tap_conv(Tensor x, Tensor weight, int64_t left, int64_t dilation, bool softmax, bool renormalize, double dropout,
                Optional seed, Optional bias, Optional gate, Optional mask, Optional cu_seqlens,
                Optional initial_state) {
  ck::cuda::Forward p;
  Device device(x);
  Copies copies;
  const View input(x), filter(weight);
  set_problem(p, device, input, filter, left, dilation, softmax, renormalize, dropout, seed, gate, mask, cu_seqlens,
              initial_state, copies);
  p.per_batch = filter.dim == 4;
  if (bias) set_bias(p, device.place, *bias, copies);
  Tensor y = allocate_like(device.place, x, input);
  p.y = rows_like(View(y), input, "y");
  if (p.batch * p.time * p.channels > 0) check_status(ck::cuda::forward(p, device.stream()));
  return y;
}

FiveTensors tap_grad(Tensor grad, Tensor x, Tensor weight, int64_t left, int64_t dilation, bool softmax,
                     bool renormalize, double dropout, Optional seed, Optional gate, Optional mask, Optional cu_seqlens,
                     Optional initial_state, int64_t needs) {
  ck::cuda::Backward p;
  Device device(x);
  Copies copies;
  const View input(x), filter(weight);
  set_problem(p, device, input, filter, left, dilation, softmax, renormalize, dropout, seed, gate, mask, cu_seqlens,
              initial_state, copies);
  p.per_batch = filter.dim == 4;
  FiveTensors results = set_gradients(p, device.place, grad, x, input, filter, gate, initial_state, needs);
  if (p.batch * p.time * p.channels == 0) return results;
  Tensor workspace = allocate(device.place, {ck::cuda::workspace_bytes(p)}, ScalarType::Byte);
  check_status(ck::cuda::backward(p, workspace.mutable_data_ptr(), device.stream()));
  return results;
}

Tensor tap_step(Tensor x, Tensor state, Tensor weight, int64_t dilation, bool softmax, bool renormalize, Optional bias,
                Optional gate, Optional state_index, Optional position) {
  ck::cuda::Step p;
  Device device(x);
  Copies copies;
  const View input(x);
  set_step(p, device.place, input, state, View(weight), dilation, softmax, renormalize, bias, gate, state_index,
           position, copies);
  Tensor y = allocate_like(device.place, x, input);
  if (p.batch * p.channels == 0) return y;
  const View output(y);
  p.y = {output.data, output.stride[0], 0, output.stride[1]};
  p.next_state = state.mutable_data_ptr();
  Contiguous index;
  std::optional<Tensor> scratch;
  if (state_index) {
    p.state_row = static_cast<const int64_t*>(index.data(device.place, *state_index));
    scratch = allocate_contiguous(device.place, View(state));
    p.scratch = scratch->mutable_data_ptr();
  }
  check_status(ck::cuda::step(p, device.stream()));
  return y;
}

}  // namespace

#if defined(CK_SIMT)
STABLE_TORCH_LIBRARY_IMPL(convkernels, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(convkernels, CUDA, m) {
#endif
  m.impl("tap_conv.cuda", TORCH_BOX(&tap_conv));
  m.impl("_tap_conv.cuda", TORCH_BOX(&tap_conv));
  m.impl("tap_grad.cuda", TORCH_BOX(&tap_grad));
  m.impl("_tap_grad.cuda", TORCH_BOX(&tap_grad));
  m.impl("tap_step.cuda", TORCH_BOX(&tap_step));
  m.impl("_tap_step.cuda", TORCH_BOX(&tap_step));
}
