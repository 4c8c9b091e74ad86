// From a problem to the launches that compute it. No device code.
#include "families.h"

#include <type_traits>

#include "../common/switch.h"
#include "rooms.h"

namespace ck::cuda {

namespace {

constexpr int64_t kVectorBytes = 16;

bool aligned(const Rows& rows, int64_t size, int64_t along, int64_t other) {
  return along == 1 && reinterpret_cast<uintptr_t>(rows.data) % kVectorBytes == 0 &&
         rows.batch * size % kVectorBytes == 0 && other * size % kVectorBytes == 0;
}

// Adds to `f` whether a tensor like x can be read and written whole vectors at a time.
void look_at(Facts& f, const Rows& rows) {
  if (rows.data == nullptr) return;
  const int64_t size = size_of(f.dtype);
  f.channel_vectors =
      f.channel_vectors && aligned(rows, size, rows.channel, rows.time) && f.channels * size % kVectorBytes == 0;
  f.time_vectors = f.time_vectors && aligned(rows, size, rows.time, rows.channel) && f.time * size % kVectorBytes == 0;
}

Facts common_facts(const Problem& p) {
  Facts f;
  f.batch = p.batch;
  f.time = p.time;
  f.channels = p.channels;
  f.heads = p.heads;
  f.taps = p.taps.taps;
  f.dilation = p.taps.dilation;
  f.dtype = p.dtype;
  f.per_position = p.per_position;
  f.renormalize = p.renormalize;
  f.per_batch = p.per_batch;
  f.gate = p.gate.data != nullptr;
  f.packed = p.offsets != nullptr;
  f.state = p.state != nullptr;
  f.channel_vectors = f.time_vectors = true;
  f.device = current_device();
  look_at(f, p.x);
  look_at(f, p.gate);
  f.channel_vectors = f.channel_vectors && reinterpret_cast<uintptr_t>(p.state) % kVectorBytes == 0;
  return f;
}

// Runs the family of a plan for the type of a problem: run(family's struct).
template <class Run>
const char* with_family(const Plan& plan, Dtype dtype, const Run& run) {
  return with_dtype(dtype, [&](auto* tag) -> const char* {
    using T = std::remove_pointer_t<decltype(tag)>;
    if constexpr (!std::is_same_v<T, double>) {
      switch (plan.family) {
        case Family::kPlain: break;
        case Family::kStream: return run(Streaming<T>{});
        case Family::kTime: return run(Timewise<T>{});
        case Family::kBand:
          if constexpr (sizeof(T) == 2) return run(Band<T>{});
          return "the band kernels are for 16-bit types";
        case Family::kRows: return run(PerRow<T>{});
      }
    }
    return run(Plain<T>{});
  });
}

// Enters where partial sums go. Returns the bytes they take.
int64_t assign(Backward& p, const Plan& plan, void* workspace) {
  p.groups = plan.groups;
  Rooms rooms(workspace, p.dtype);
  const int64_t rows = p.owners() * p.groups;
  if (p.grad_weight != nullptr && !p.per_position)
    p.partial_weight = rooms.take(rows * (p.renormalize ? p.heads : p.channels) * p.taps.taps);
  if (p.grad_bias != nullptr) p.partial_bias = rooms.take(rows * p.channels);
  if (p.per_row() && p.softmax) p.statistics = rooms.take(2 * p.batch * p.time * p.heads);
  return rooms.used();
}

}  // namespace

Facts facts_of(const Forward& p) {
  Facts f = common_facts(p);
  look_at(f, p.y);
  return f;
}

Facts facts_of(const Backward& p) {
  Facts f = common_facts(p);
  look_at(f, p.grad);
  look_at(f, p.grad_x);
  look_at(f, p.grad_gate);
  return f;
}

const char* forward(const Forward& p, Stream stream) {
  const Plan plan = plan_forward(facts_of(p));
  return with_family(plan, p.dtype, [&](auto family) { return family.forward(p, plan, stream); });
}

int64_t workspace_bytes(const Backward& p) {
  Backward copy = p;
  return assign(copy, plan_backward(facts_of(p)), nullptr);
}

const char* backward(Backward p, void* workspace, Stream stream) {
  const Plan plan = plan_backward(facts_of(p));
  assign(p, plan, workspace);
  return with_family(plan, p.dtype, [&](auto family) { return family.backward(p, plan, stream); });
}

const char* step(const Step& p, Stream stream) {
  return with_dtype(p.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    return Plain<T>::step(p, stream);
  });
}

}  // namespace ck::cuda
