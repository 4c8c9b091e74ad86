// The primitives of csrc/cuda/device/warpgroup.cuh for a host compiler.
#pragma once

#include <concepts>
#include <cstdint>

#include "csrc/simt/groups.h"
#include "csrc/simt/primitives.h"
#include "csrc/simt/products.h"
#include "csrc/simt/tensor.h"

namespace ck::cuda {

inline constexpr bool kWarpgroups = true;
inline void stop_kernel() {}

using simt::make_tensor_map;
using simt::TensorMap;
inline void prefetch_tensor_map(const TensorMap&) {}
[[gnu::always_inline]] inline void tensor_load(void* shared, const TensorMap& map, int at0, int at1, int at2, int at3,
                                               uint64_t* mbarrier) {
  simt::tensor_load(shared, map, {at0, at1, at2, at3}, mbarrier);
}

// What an alignment to 1024 bytes is needed for goes by the distance from here.
inline char* shared_memory_1024() { return simt::dynamic_shared(); }

inline void barrier_sync(int barrier, int threads) { simt::barrier_sync(barrier, threads); }
inline void barrier_arrive(int barrier, int threads) { simt::barrier_arrive(barrier, threads); }

template <int kRegisters>
void take_registers() {
  simt::set_registers(kRegisters, true);
}
template <int kRegisters>
void give_registers() {
  simt::set_registers(kRegisters, false);
}

inline void wgmma_fence() { simt::products_fence(); }
inline void wgmma_commit() { simt::products_commit(); }
template <int Newest>
void wgmma_wait() {
  simt::products_wait(Newest);
}
template <class N, int kX>
void keep_registers(N (&)[kX][4]) {}

template <class T, int kN, Major kA = Major::kSummed, Major kB = Major::kSummed>
[[gnu::always_inline]] inline void wgmma(float (&d)[kN / 8][4], const Operand& a, const Operand& b, bool add) {
  static_assert(std::same_as<T, bf16> || std::same_as<T, f16>);
  static_assert(kN == 32 || kN == 64 || kN == 128);
  simt::multiply_warpgroup(kN, std::same_as<T, bf16>, d[0], nullptr,
                           {a.descriptor(), b.descriptor(), false, kA == Major::kOther, kB == Major::kOther, add});
}

template <class T, int kN, Major kB = Major::kSummed>
[[gnu::always_inline]] inline void wgmma(float (&d)[kN / 8][4], const uint32_t (&a)[4], const Operand& b, bool add) {
  static_assert(std::same_as<T, bf16> || std::same_as<T, f16>);
  static_assert(kN == 32 || kN == 64 || kN == 128);
  simt::multiply_warpgroup(kN, std::same_as<T, bf16>, d[0], a,
                           {0, b.descriptor(), true, false, kB == Major::kOther, add});
}

}  // namespace ck::cuda
