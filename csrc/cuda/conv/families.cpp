// From a problem to the launches that compute it. No device code.
#include "csrc/cuda/conv/families.h"

#include <algorithm>
#include <type_traits>

#include "csrc/common/switch.h"
#include "csrc/cuda/device/workspace.h"

namespace ck::cuda {

namespace {

// The greatest power of two, at most 16, that divides all of the numbers whose bits are given: addresses and strides in
// bytes.
int64_t max_vector_bytes(uint64_t bits) { return static_cast<int64_t>((bits | 16) & (~(bits | 16) + 1)); }

// The bytes of a vector in which rows of `length` numbers, `other` apart, can be read and written; 0 if less than a
// number.
int64_t vector_bytes_of(const Rows& rows, int64_t size, int64_t length, int64_t along, int64_t other) {
  const int64_t bytes = max_vector_bytes(reinterpret_cast<uintptr_t>(rows.data) |
                                         static_cast<uint64_t>((rows.batch | other | length) * size));
  return along == 1 && bytes >= size ? bytes : 0;
}

// Limits the vectors of `f` to those in which this tensor, like x, can be read and written.
void add_alignment(Facts& f, const Rows& rows) {
  if (rows.data == nullptr) return;
  const int64_t size = size_of(f.dtype), channel = f.channels == 1 ? 0 : rows.channel;
  f.channel_bytes = std::min(f.channel_bytes, vector_bytes_of(rows, size, f.channels, rows.channel, rows.time));
  f.time_bytes = std::min(f.time_bytes, vector_bytes_of(rows, size, f.time, rows.time, channel));
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
  f.weight_bytes = size_of(p.weight_dtype);
  f.channel_bytes = f.time_bytes = 16;
  f.device = current_device();
  add_alignment(f, p.x);
  add_alignment(f, p.gate);
  f.channel_bytes = std::min(f.channel_bytes, max_vector_bytes(reinterpret_cast<uintptr_t>(p.state)));
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
        case Family::kStream: return run(StreamFamily<T>{});
        case Family::kTime: return run(TimeFamily<T>{});
        case Family::kBand:
          if constexpr (sizeof(T) == 2) return run(BandFamily<T>{});
          return "the band kernels are for 16-bit types";
        case Family::kRows: return run(RowsFamily<T>{});
      }
    }
    return run(PlainFamily<T>{});
  });
}

void set_vector_bytes(Problem& p, const Facts& facts, const Plan& plan) {
  int64_t bytes = plan.family == Family::kTime ? facts.time_bytes : facts.channel_bytes;
  // Their blocks begin at a head, and two lanes together have 16 bytes of one.
  if (plan.family == Family::kRows && plan.lanes > 1)
    bytes = std::min(bytes, max_vector_bytes(static_cast<uint64_t>(p.head_channels() * size_of(p.dtype))));
  p.vector_bytes = static_cast<int>(bytes);
}

// Enters where partial sums go. Returns the bytes they take.
int64_t assign(Backward& p, const Plan& plan, void* workspace) {
  p.groups = plan.groups;
  Workspace sums(workspace, p.dtype);
  const int64_t rows = p.owners() * p.groups;
  const int64_t pieces = plan.family == Family::kRows   ? rows_pieces(p.head_channels())
                         : plan.family == Family::kBand ? band_shape(p).pieces
                                                        : 1;
  if (p.grad_weight != nullptr && !p.per_position)
    p.partial_weight = sums.take(rows * (p.renormalize ? p.heads * pieces : p.channels) * p.taps.taps);
  const bool whole = plan.family == Family::kBand
                         ? band_whole_heads(static_cast<int>(pieces), static_cast<int>(plan.units))
                         : pieces == 1;
  if (p.grad_weight != nullptr && p.per_position && !whole)
    p.partial_weight = sums.take(pieces * p.filters() * p.taps.taps);
  if (p.grad_bias != nullptr) p.partial_bias = sums.take(rows * p.channels);
  if (p.per_row() && p.softmax && plan.family == Family::kPlain) p.statistics = sums.take(2 * p.filters());
  return sums.bytes();
}

}  // namespace

Facts facts_of(const Forward& p) {
  Facts f = common_facts(p);
  add_alignment(f, p.y);
  for (const Rows& rows : {p.finish.out_gate, p.finish.residual, p.finish.grad, p.finish.grad_out_gate})
    add_alignment(f, rows);
  return f;
}

Facts facts_of(const Backward& p) {
  Facts f = common_facts(p);
  add_alignment(f, p.grad);
  add_alignment(f, p.grad_x);
  add_alignment(f, p.grad_gate);
  return f;
}

const char* forward(Forward p, Stream stream) {
  const Facts facts = facts_of(p);
  const Plan plan = plan_forward(facts);
  set_vector_bytes(p, facts, plan);
  return with_family(plan, p.dtype, [&](auto family) { return family.forward(p, plan, stream); });
}

Launch prepare(Backward& p) {
  const Facts facts = facts_of(p);
  const Plan plan = plan_backward(facts);
  set_vector_bytes(p, facts, plan);
  return {plan, assign(p, plan, nullptr)};
}

const char* backward(Backward p, const Launch& launch, void* workspace, Stream stream) {
  assign(p, launch.plan, workspace);
  return with_family(launch.plan, p.dtype, [&](auto family) { return family.backward(p, launch.plan, stream); });
}

const char* step(Step p, Stream stream) {
  States& s = p.states;
  const int64_t size = size_of(p.dtype);
  // What makes no difference is left out.
  if (s.width == p.taps.span()) s.accepted = {};
  if (s.position.data == nullptr) p.renormalize = false;
  if (p.channels == 1) s.pool.channel = s.pool.time == 1 ? s.width : 1;
  const bool run = step_layout(p) == StepLayout::kRun;
  const int64_t length = p.channels * (run ? s.width : 1), row = run ? 0 : s.pool.time;
  p.vector_bytes = static_cast<int>(max_vector_bytes(reinterpret_cast<uintptr_t>(s.pool.data) |
                                                     static_cast<uint64_t>((length | row | s.pool.batch) * size)));
  const StepTiles tiles = step_tiles(p, current_device());
  if (tiles.rows * std::max<int64_t>(tiles.items(p, tiles.time), 1) > INT32_MAX ||
      (tiles.layout == StepLayout::kNumbers && tiles.width * s.width > INT32_MAX))
    return "more positions, or numbers of a state, than a block can count";
  if (!step_moves_up(p) && !tiles.whole(s.width))
    return "state_index with accepted: states of one channel that exceed the shared memory of a block";
  return with_dtype(p.dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    return PlainFamily<T>::step(p, tiles, stream);
  });
}

}  // namespace ck::cuda
