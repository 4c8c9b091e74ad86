// Included once per type, with CK_TYPE defined.
#include "csrc/cuda/conv/families.h"
#include "csrc/cuda/conv/rows.cuh"

namespace ck::cuda {

template <class T>
const char* RowsFamily<T>::forward(const Forward& p, const Plan& plan, Stream stream) {
  const Columns columns = rows_columns(p.channels, p.head_channels(), plan.lanes);
  const int64_t blocks = columns.blocks * plan.groups * p.owners();
  return with_bool(p.gate.data != nullptr, [&](auto gate) {
    constexpr bool kGate = decltype(gate)::value;
    return launch(p.finishes() ? rows_forward_finished<T, kGate> : rows_forward<T, kGate>,
                  dim3(static_cast<unsigned>(blocks)), dim3(kStreamThreads), static_cast<size_t>(plan.shared_bytes),
                  stream, p, columns, static_cast<int>(plan.lanes), plan.groups);
  });
}

template <class T>
const char* RowsFamily<T>::backward(const Backward& p, const Plan& plan, Stream stream) {
  const Columns columns = rows_columns(p.channels, p.head_channels(), plan.lanes);
  const int64_t blocks = columns.blocks * plan.groups * p.owners();
  const char* status = with_bool(p.gate.data != nullptr, [&](auto gate) {
    return launch(rows_backward<T, decltype(gate)::value>, dim3(static_cast<unsigned>(blocks)), dim3(kStreamThreads),
                  static_cast<size_t>(plan.shared_bytes), stream, p, columns, static_cast<int>(plan.lanes));
  });
  if (status == nullptr && p.grad_weight != nullptr && !p.per_position)
    status = Reduce<float>::weight(p, columns.pieces, true, stream);
  if (status == nullptr && p.grad_weight != nullptr && p.per_position && columns.pieces > 1)
    status = add_pieces(p, columns.pieces, stream);
  if (status == nullptr && p.grad_bias != nullptr) status = Reduce<float>::bias(p, p.owners() * p.groups, stream);
  return status;
}

template struct RowsFamily<CK_TYPE>;

}  // namespace ck::cuda
