// The primitives of csrc/cuda/device/primitives.cuh, and the part of CUDA's language that kernels use, for a host
// compiler.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <source_location>
#include <tuple>
#include <type_traits>
#include <utility>

#include "csrc/common/dtypes.h"
#include "csrc/cuda/device/device.h"
#include "csrc/simt/block.h"
#include "csrc/simt/bulk.h"
#include "csrc/simt/types.h"
#include "csrc/simt/warp.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define CK_DEVICE inline
#define CK_PARAM
#define CK_GLOBAL(threads, blocks)
#define CK_UNROLL _Pragma("GCC unroll 32")
#define CK_SHARED(type, name, count) \
  static const char name##_site = 0; \
  type(&name)[count] =               \
      *static_cast<type(*)[count]>(::ck::simt::static_shared(&name##_site, sizeof(type) * (count), alignof(type)))

namespace ck::simt {

template <class T>
concept Word = std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

template <Word T>
T shuffle(Shuffle mode, unsigned mask, T value, int argument, int width) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  return std::bit_cast<T>(
      static_cast<Bits>(shuffle(mode, mask, uint64_t{std::bit_cast<Bits>(value)}, argument, width)));
}

inline constexpr Collective kSyncthreads{"__syncthreads", nullptr, Meeting::kBarrier};
inline constexpr Collective kSyncthreadsOr{"__syncthreads_or", nullptr, Meeting::kBarrier};

}  // namespace ck::simt

inline void __syncthreads() { ck::simt::block_wait(ck::simt::kSyncthreads, false); }
inline int __syncthreads_or(int predicate) {
  return ck::simt::block_wait(ck::simt::kSyncthreadsOr, predicate != 0) != 0;
}
inline void __syncwarp(unsigned mask = ~0u) { ck::simt::warp_barrier(mask); }

template <ck::simt::Word T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return ck::simt::shuffle(ck::simt::Shuffle::kIndex, mask, value, lane, width);
}
template <ck::simt::Word T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return ck::simt::shuffle(ck::simt::Shuffle::kUp, mask, value, static_cast<int>(by), width);
}
template <ck::simt::Word T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return ck::simt::shuffle(ck::simt::Shuffle::kDown, mask, value, static_cast<int>(by), width);
}
template <ck::simt::Word T>
T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32) {
  return ck::simt::shuffle(ck::simt::Shuffle::kXor, mask, value, by, width);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return ck::simt::vote(ck::simt::Vote::kBallot, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return ck::simt::vote(ck::simt::Vote::kAny, mask, predicate != 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
  return ck::simt::vote(ck::simt::Vote::kAll, mask, predicate != 0) == mask;
}

inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned by) {
  const uint64_t both = uint64_t{high} << 32 | low;
  return static_cast<unsigned>(both << std::min(by, 32u) >> 32);
}

namespace ck::cuda {

inline char* shared_memory() { return simt::dynamic_shared(); }
inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(static_cast<const char*>(shared) - shared_memory());
}

// Inline, so that what is counted has the place of its use.
template <int Bytes>
[[gnu::always_inline]] inline void cp_async(void* shared, const void* global, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
  simt::copy_async(shared, global, Bytes, valid);
}
inline void store_four(float* global, float a, float b, float c, float d) {
  *reinterpret_cast<float4*>(global) = make_float4(a, b, c, d);
}

inline void cp_async_commit() { simt::copy_commit(); }
template <int Newest>
void cp_async_wait() {
  simt::copy_wait(Newest);
}

inline void mbarrier_init(uint64_t* mbarrier, unsigned arrivals) { simt::mbarrier_init(mbarrier, arrivals); }
inline void mbarrier_invalidate(uint64_t* mbarrier) { simt::mbarrier_invalidate(mbarrier); }
inline void mbarrier_arrive(uint64_t* mbarrier) { simt::mbarrier_arrive(mbarrier); }
inline void mbarrier_expect(uint64_t* mbarrier, unsigned bytes) { simt::mbarrier_expect(mbarrier, bytes); }
inline void mbarrier_arrive_expect(uint64_t* mbarrier, unsigned bytes) {
  simt::mbarrier_expect(mbarrier, bytes);
  simt::mbarrier_arrive(mbarrier);
}
inline bool mbarrier_try_wait(uint64_t* mbarrier, unsigned parity) { return simt::mbarrier_try_wait(mbarrier, parity); }
inline void fence_mbarrier_init() { simt::fence_mbarrier_init(); }
inline void fence_async_proxy() { simt::fence_proxy_async(); }
[[gnu::always_inline]] inline void bulk_load(void* shared, const void* global, unsigned bytes, uint64_t* mbarrier) {
  simt::bulk_load(shared, global, bytes, mbarrier);
}
[[gnu::always_inline]] inline void bulk_store(void* global, const void* shared, unsigned bytes) {
  simt::bulk_store(global, shared, bytes);
}
inline void bulk_commit() { simt::bulk_commit(); }
template <int Newest>
void bulk_wait() {
  simt::bulk_wait(Newest, false);
}
template <int Newest>
void bulk_wait_read() {
  simt::bulk_wait(Newest, true);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { simt::load_matrices(r, false, row); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { simt::load_matrices(r, true, row); }

inline int opaque(int x) { return x; }

inline float fast_exp2(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;  // false for NaN
}
inline float fast_reciprocal(float x) {
  const float y = 1.0f / x;
  return std::abs(y) < 0x1p-126f ? 0.0f : y;
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::same_as<T, bf16> || std::same_as<T, f16>);
  if constexpr (std::same_as<T, bf16>)
    simt::multiply_bf16(d, a, b);
  else
    simt::multiply_f16(d, a, b);
}

inline void mma_m16n8k8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { simt::multiply_tf32(d, a, b); }

// A grid and the place that launches it, for the status.
struct Grid : dim3 {
  std::source_location where;
  Grid(dim3 size, std::source_location where = std::source_location::current()) : dim3(size), where(where) {}
  Grid(unsigned x, unsigned y = 1, unsigned z = 1, std::source_location where = std::source_location::current())
      : dim3(x, y, z), where(where) {}
};

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), Grid grid, dim3 block, size_t shared_bytes, Stream,
                   Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> values;
  };
  const Call call{kernel, {std::forward<Arguments>(arguments)...}};
  const auto run = [](const void* p) {
    const Call& call = *static_cast<const Call*>(p);
    std::apply(call.kernel, call.values);
  };
  return simt::run(
      {grid, block, shared_bytes, grid.where, run, &call, sizeof call, reinterpret_cast<const void*>(kernel)});
}

}  // namespace ck::cuda
