// The epilogue of the forward passes: what becomes of their sums, in the accumulation type, before they are rounded.
#pragma once

#include "csrc/cuda/conv/inputs.cuh"
#include "csrc/cuda/device/vectors.cuh"

namespace ck::cuda {

// Finishes sums that lie side by side in memory, along channels or positions: where those of batch row b, position t
// and channel c are in the tensors of the epilogue.
template <class T>
class FinishAt {
 public:
  using C = Compute<T>;

  CK_DEVICE FinishAt(const Finish& f, int64_t b, int64_t t, int64_t c)
      : f_(f),
        out_gate_(at<const T>(f.out_gate, b, t, c)),
        other_(at<const T>(other(), b, t, c)),
        grad_out_gate_(at<T>(f.grad_out_gate, b, t, c)) {}

  // So many positions on.
  CK_DEVICE void move(int64_t positions) {
    out_gate_ += positions * f_.out_gate.time;
    other_ += positions * other().time;
    grad_out_gate_ += positions * f_.grad_out_gate.time;
  }

  // Of one sum the number to be stored.
  CK_DEVICE C finished(C sum) const {
    C to_out_gate = 0;
    const C y = finished(sum, f_.out_gate.data == nullptr ? C{1} : widen(*out_gate_),
                         other().data == nullptr ? C{0} : widen(*other_), to_out_gate);
    if (f_.grad_out_gate.data != nullptr) *grad_out_gate_ = narrow<T>(to_out_gate);
    return y;
  }

  // The same, in place, of words of T, `offset` elements on: the first `count` sums, which are whole pieces of `bytes`.
  template <int kWords>
  CK_DEVICE void finish(float* sums, int offset, int count, int bytes) const {
    constexpr int kCount = kWords * kPerWord<T>;
    float gates[kCount], others[kCount];
    load<kWords>(gates, f_.out_gate, out_gate_ + offset, 1, count, bytes);
    load<kWords>(others, other(), other_ + offset, 0, count, bytes);
    float to_out_gate[kCount];
#pragma unroll
    for (int e = 0; e < kCount; ++e) sums[e] = finished(sums[e], gates[e], others[e], to_out_gate[e]);
    if (f_.grad_out_gate.data == nullptr) return;
    uint32_t words[kWords];
    pack<T>(words, to_out_gate);
    store_pieces(grad_out_gate_ + offset, words, count, bytes);
  }

 private:
  // d(y), or the residual: what both have in one place.
  CK_DEVICE const Rows& other() const { return f_.differentiates() ? f_.grad : f_.residual; }

  // The one place that says what the epilogue is.
  CK_DEVICE C finished(C sum, C out_gate, C other, C& to_out_gate) const {
    const C open = sigmoid<T>(sum), value = activated(sum, open, f_.activation);
    if (!f_.differentiates()) return other + out_gate * value;
    to_out_gate = other * value;
    return times_slope(other * out_gate, sum, open, f_.activation);
  }

  // `none` where there is no such tensor.
  template <int kWords>
  static CK_DEVICE void load(float* to, const Rows& rows, const T* from, float none, int count, int bytes) {
    if (rows.data == nullptr) {
#pragma unroll
      for (int e = 0; e < kWords * kPerWord<T>; ++e) to[e] = none;
      return;
    }
    uint32_t words[kWords];
    load_pieces(words, from, count, bytes);
    unpack<T>(to, words);
  }

  const Finish& f_;
  const T *out_gate_, *other_;
  T* grad_out_gate_;
};

}  // namespace ck::cuda
