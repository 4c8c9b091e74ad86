// Storage types to the accumulation type and back.
#pragma once

#include "csrc/common/conv.h"
#include "csrc/common/dtypes.h"
#include "csrc/common/taps.h"
#include "csrc/cuda/device/primitives.cuh"

#if !defined(__CUDACC__)
#include <bit>
#include <cmath>
#endif

namespace ck::cuda {

CK_DEVICE double widen(double value) { return value; }
CK_DEVICE float widen(float value) { return value; }
CK_DEVICE float widen(bf16 value) { return __uint_as_float(uint32_t{value.bits} << 16); }
CK_DEVICE float widen(f16 value) {
#if defined(__CUDACC__)
  return widen_half(value.bits);
#else
  return static_cast<float>(std::bit_cast<_Float16>(value.bits));
#endif
}

template <class T>
CK_DEVICE T narrow(Compute<T> value);

template <>
CK_DEVICE double narrow<double>(double value) {
  return value;
}
template <>
CK_DEVICE float narrow<float>(float value) {
  return value;
}
// To nearest, ties to even; a NaN stays one.
template <>
CK_DEVICE bf16 narrow<bf16>(float value) {
#if defined(__CUDACC__)
  return {narrow_bits<bf16>(value)};
#else
  const uint32_t bits = __float_as_uint(value);
  const uint32_t rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  return {static_cast<uint16_t>((value == value ? rounded : bits | 0x400000u) >> 16)};
#endif
}
template <>
CK_DEVICE f16 narrow<f16>(float value) {
#if defined(__CUDACC__)
  return {narrow_bits<f16>(value)};
#else
  return {std::bit_cast<uint16_t>(static_cast<_Float16>(value))};
#endif
}

// Two numbers of a 16-bit type in one word, the first in its low half. One instruction where there is one.
template <class T>
CK_DEVICE uint32_t narrow_pair(float low, float high) {
#if defined(__CUDACC__)
  return narrow_two<T>(low, high);
#else
  return uint32_t{narrow<T>(low).bits} | uint32_t{narrow<T>(high).bits} << 16;
#endif
}

// `found` + 0 * pair, number by number: zeros, of either sign, as long as all pairs are finite.
template <class T>
CK_DEVICE uint32_t not_finite_pair(uint32_t pair, uint32_t found) {
#if defined(__CUDACC__)
  return multiply_add_two<T>(pair, 0, found);
#else
  const auto times_zero = [](uint32_t bits, uint32_t sum) {
    return 0.0f * widen(T{static_cast<uint16_t>(bits)}) + widen(T{static_cast<uint16_t>(sum)});
  };
  return narrow_pair<T>(times_zero(pair, found), times_zero(pair >> 16, found >> 16));
#endif
}

// What it has found so far.
CK_DEVICE bool all_finite(uint32_t found) { return (found & 0x7fff7fffu) == 0; }

// Element `index` of an array whose type is known at run time.
template <class C>
CK_DEVICE C load_as(const void* data, int64_t index, Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64: return static_cast<C>(static_cast<const double*>(data)[index]);
    case Dtype::kFloat32: return static_cast<C>(static_cast<const float*>(data)[index]);
    case Dtype::kBFloat16: return static_cast<C>(widen(static_cast<const bf16*>(data)[index]));
    case Dtype::kFloat16: return static_cast<C>(widen(static_cast<const f16*>(data)[index]));
  }
  return C{0};
}

template <class C>
CK_DEVICE void store_as(void* data, int64_t index, Dtype dtype, C value) {
  switch (dtype) {
    case Dtype::kFloat64: static_cast<double*>(data)[index] = value; break;
    case Dtype::kFloat32: static_cast<float*>(data)[index] = static_cast<float>(value); break;
    case Dtype::kBFloat16: static_cast<bf16*>(data)[index] = narrow<bf16>(static_cast<float>(value)); break;
    case Dtype::kFloat16: static_cast<f16*>(data)[index] = narrow<f16>(static_cast<float>(value)); break;
  }
}

template <class C>
CK_DEVICE C infinity() {
  return static_cast<C>(INFINITY);
}

CK_DEVICE float exponential(float value) { return expf(value); }
CK_DEVICE double exponential(double value) { return exp(value); }

// Of numbers that were, and become, of type T: for 16 bits the short way to a few units in the last place of float32 is
// more than enough.
template <class T>
CK_DEVICE Compute<T> sigmoid(Compute<T> value) {
  if constexpr (sizeof(T) == 2)
    return fast_reciprocal(1.0f + fast_exp2(value * -1.4426950408889634f));  // log2(e)
  else
    return Compute<T>{1} / (Compute<T>{1} + exponential(-value));
}

// act(value), and d * act'(value); `open` is the sigmoid of the value.
template <class C>
CK_DEVICE C activated(C value, C open, Activation activation) {
  return activation == Activation::kNone ? value : activation == Activation::kSilu ? value * open : open;
}
template <class C>
CK_DEVICE C times_slope(C d, C value, C open, Activation activation) {
  if (activation == Activation::kNone) return d;
  return d * open * (activation == Activation::kSilu ? 1 + value * (1 - open) : 1 - open);
}

// Calls use(activation): for the sigmoid, which most gates go through, in a copy of its own, whose loops do not ask.
template <class Use>
CK_DEVICE void with_activation(Activation activation, const Use& use) {
  if (activation == Activation::kSigmoid)
    use(Activation::kSigmoid);
  else
    use(activation);
}

template <class N>
CK_HD N min(N a, N b) {
  return a < b ? a : b;
}
template <class N>
CK_HD N max(N a, N b) {
  return a < b ? b : a;
}
CK_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
CK_HD int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

}  // namespace ck::cuda
