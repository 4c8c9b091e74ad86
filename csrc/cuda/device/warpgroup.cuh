// What kernels for compute capability 9.0 alone are written with, besides primitives.cuh: matrix products of a
// warpgroup (4 warps, the first of them a multiple of 4), tensor maps, named barriers and the registers of a warpgroup.
// Compiled by a host compiler with CK_SIMT, the same names stand for csrc/simt/warpgroup.h.
//
// Operands in shared memory lie as tensor_load lays them: panels of rows of 128 bytes, each panel at a multiple of 1024
// bytes, where the 16-byte piece p of row r stands in place of piece p ^ (r % 8).
#pragma once

#include "csrc/cuda/device/primitives.cuh"

namespace ck::cuda {

// Which dimension of an operand lies along rows of 128 bytes: the one that is summed over, or the other one.
enum class Major { kSummed, kOther };

// An operand in shared memory. kSummed: 8 rows from one group of 8 rows to the next are 1024 bytes apart, `panel` is
// not used, and 16 numbers of the summed dimension later is 32 bytes further. kOther: 64 numbers of the other dimension
// lie in a row, 64 more `panel` bytes later, and 16 numbers of the summed dimension are 16 rows, 2048 bytes.
struct Operand {
  uint32_t low;  // the address and `panel`, in units of 16 bytes

  CK_DEVICE Operand further(int bytes) const { return {low + static_cast<uint32_t>(bytes >> 4)}; }
  CK_DEVICE uint64_t descriptor() const { return low | uint64_t{1024 >> 4 | 1 << 30} << 32; }
};
CK_DEVICE Operand operand(const void* shared, unsigned panel = 16) {
  // Found anew for every product, it takes no register in between.
  return {static_cast<uint32_t>(opaque(static_cast<int>(shared_address(shared) >> 4 | panel >> 4 << 16)))};
}

}  // namespace ck::cuda

#if defined(CK_SIMT)
#include "csrc/simt/warpgroup.h"
#else

#include <cuda.h>

// Machine code for 9.0 exists if the file is compiled for sm_90a; elsewhere a kernel that uses these stops.
namespace ck::cuda {

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
constexpr bool kWarpgroups = true;
#define CK_PTX_90A(...) asm volatile(__VA_ARGS__)
#else
constexpr bool kWarpgroups = false;
#define CK_PTX_90A(...) __trap()
#endif
CK_DEVICE void stop_kernel() { __trap(); }

// A tensor [size3, size2, size1, size0] of 16-bit numbers, of which tensor_load reads boxes of 64 x box1 numbers of the
// dimensions 0 and 1, with zeros outside of the tensor. A kernel parameter.
struct TensorMap {
  CUtensorMap map;
};

// stride: in bytes, of dimensions 1 to 3, multiples of 16, like the address. nullptr, or what is wrong.
inline const char* make_tensor_map(TensorMap& map, const void* data, const int64_t (&size)[4],
                                   const int64_t (&stride)[3], int box1) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    return found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(entry) : nullptr;
  }();
  if (encode == nullptr) return "the driver has no cuTensorMapEncodeTiled";
  cuuint64_t sizes[4], strides[3];
  for (int i = 0; i < 4; ++i) sizes[i] = static_cast<cuuint64_t>(size[i]);
  for (int i = 0; i < 3; ++i) strides[i] = static_cast<cuuint64_t>(stride[i]);
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(box1), 1, 1}, steps[4] = {1, 1, 1, 1};
  const CUresult result = encode(&map.map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(data), sizes, strides,
                                 box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refuses the strides of a tensor";
}

CK_DEVICE void prefetch_tensor_map(const TensorMap& map) {
  CK_PTX_90A("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies the box whose first number is [at3, at2, at1, at0] to shared memory, a multiple of 1024 bytes; all its 128
// box1 bytes count at the mbarrier. By one thread.
CK_DEVICE void tensor_load(void* shared, const TensorMap& map, int at0, int at1, int at2, int at3, uint64_t* mbarrier) {
  CK_PTX_90A(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(at0), "r"(at1), "r"(at2), "r"(at3), "r"(shared_address(mbarrier)) : "memory");
}

// Dynamic shared memory, aligned to 1024 bytes, for kernels without static shared memory.
CK_DEVICE char* shared_memory_1024() {
  extern __shared__ __align__(1024) char ck_shared_memory_1024[];
  return ck_shared_memory_1024;
}

// Barriers 1 to 15. All of `threads` wait, or arrive without waiting; `threads` is a multiple of 32.
CK_DEVICE void barrier_sync(int barrier, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
CK_DEVICE void barrier_arrive(int barrier, int threads) {
  asm volatile("barrier.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Registers per thread of the calling warpgroup from here on, a multiple of 8: more than before, or fewer.
template <int kRegisters>
CK_DEVICE void take_registers() {
  CK_PTX_90A("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
CK_DEVICE void give_registers() {
  CK_PTX_90A("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Before the first product of a group, whose operands and sums in registers other instructions have written.
CK_DEVICE void wgmma_fence() { CK_PTX_90A("wgmma.fence.sync.aligned;" :: : "memory"); }
CK_DEVICE void wgmma_commit() { CK_PTX_90A("wgmma.commit_group.sync.aligned;" :: : "memory"); }
// Waits for all groups of products but the `Newest` last ones: their operands may be overwritten, their sums read.
template <int Newest>
CK_DEVICE void wgmma_wait() {
  CK_PTX_90A("wgmma.wait_group.sync.aligned %0;" ::"n"(Newest) : "memory");
}
// The compiler leaves these registers alone from here to the next product, or from the last one to here.
template <int kX>
CK_DEVICE void keep_registers(float (&values)[kX][4]) {
#pragma unroll
  for (int x = 0; x < kX; ++x)
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(values[x][e]));
}
template <int kX>
CK_DEVICE void keep_registers(uint32_t (&values)[kX][4]) {
#pragma unroll
  for (int x = 0; x < kX; ++x)
    for (int e = 0; e < 4; ++e) asm volatile("" : "+r"(values[x][e]));
}

#define CK_SUM(x) "+f"(d[x][0]), "+f"(d[x][1]), "+f"(d[x][2]), "+f"(d[x][3])
#define CK_SUMS_32 CK_SUM(0), CK_SUM(1), CK_SUM(2), CK_SUM(3)
#define CK_SUMS_64 CK_SUMS_32, CK_SUM(4), CK_SUM(5), CK_SUM(6), CK_SUM(7)
#define CK_SUMS_128 \
  CK_SUMS_64, CK_SUM(8), CK_SUM(9), CK_SUM(10), CK_SUM(11), CK_SUM(12), CK_SUM(13), CK_SUM(14), CK_SUM(15)
#define CK_NAMES_32 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"
#define CK_NAMES_64                                                                                                 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31}"
#define CK_NAMES_128                                                                                                \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "  \
  "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
// The operands that follow the sums d have the numbers given.
#define CK_WGMMA_SHARED(n, type, a_, b_, add_, a_major_, b_major_)                                                     \
  CK_PTX_90A("{\n .reg .pred p;\n setp.ne.b32 p, %" add_ ", 0;\n wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type \
             "." type " " CK_NAMES_##n ", %" a_ ", %" b_ ", p, 1, 1, %" a_major_ ", %" b_major_                        \
                                       ";\n}" : CK_SUMS_##n : "l"(a.descriptor()),                                     \
             "l"(b.descriptor()), "r"(static_cast<int>(add)), "n"(kA == Major::kOther),                                \
             "n"(kB == Major::kOther) : "memory")
#define CK_WGMMA_REGISTERS(n, type, a0_, a1_, a2_, a3_, b_, add_, b_major_)                                            \
  CK_PTX_90A("{\n .reg .pred p;\n setp.ne.b32 p, %" add_ ", 0;\n wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type \
             "." type " " CK_NAMES_##n ", {%" a0_ ", %" a1_ ", %" a2_ ", %" a3_ "}, %" b_ ", p, 1, 1, %" b_major_      \
                                       ";\n}" : CK_SUMS_##n : "r"(a[0]),                                               \
             "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor()), "r"(static_cast<int>(add)),                         \
             "n"(kB == Major::kOther) : "memory")

// d = a b, or d += a b if `add`, in the background: a of 64 x 16 and b of 16 x kN numbers of type T, 32, 64 or 128. Of
// the sums, warp w of the warpgroup has the rows 16 w to 16 w + 15, in fragments of 8 columns each like those of
// mma_m16n8k16. a, b: operand().
template <class T, int kN, Major kA = Major::kSummed, Major kB = Major::kSummed>
CK_DEVICE void wgmma(float (&d)[kN / 8][4], const Operand& a, const Operand& b, bool add) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
  static_assert(kN == 32 || kN == 64 || kN == 128);
  if constexpr (kN == 32 && std::is_same_v<T, bf16>)
    CK_WGMMA_SHARED(32, "bf16", "16", "17", "18", "19", "20");
  else if constexpr (kN == 32)
    CK_WGMMA_SHARED(32, "f16", "16", "17", "18", "19", "20");
  else if constexpr (kN == 64 && std::is_same_v<T, bf16>)
    CK_WGMMA_SHARED(64, "bf16", "32", "33", "34", "35", "36");
  else if constexpr (kN == 64)
    CK_WGMMA_SHARED(64, "f16", "32", "33", "34", "35", "36");
  else if constexpr (std::is_same_v<T, bf16>)
    CK_WGMMA_SHARED(128, "bf16", "64", "65", "66", "67", "68");
  else
    CK_WGMMA_SHARED(128, "f16", "64", "65", "66", "67", "68");
}

// The same with a in registers: each warp's 16 x 16 numbers as for mma_m16n8k16.
template <class T, int kN, Major kB = Major::kSummed>
CK_DEVICE void wgmma(float (&d)[kN / 8][4], const uint32_t (&a)[4], const Operand& b, bool add) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
  static_assert(kN == 32 || kN == 64 || kN == 128);
  if constexpr (kN == 32 && std::is_same_v<T, bf16>)
    CK_WGMMA_REGISTERS(32, "bf16", "16", "17", "18", "19", "20", "21", "22");
  else if constexpr (kN == 32)
    CK_WGMMA_REGISTERS(32, "f16", "16", "17", "18", "19", "20", "21", "22");
  else if constexpr (kN == 64 && std::is_same_v<T, bf16>)
    CK_WGMMA_REGISTERS(64, "bf16", "32", "33", "34", "35", "36", "37", "38");
  else if constexpr (kN == 64)
    CK_WGMMA_REGISTERS(64, "f16", "32", "33", "34", "35", "36", "37", "38");
  else if constexpr (std::is_same_v<T, bf16>)
    CK_WGMMA_REGISTERS(128, "bf16", "64", "65", "66", "67", "68", "69", "70");
  else
    CK_WGMMA_REGISTERS(128, "f16", "64", "65", "66", "67", "68", "69", "70");
}

#undef CK_SUM
#undef CK_SUMS_32
#undef CK_SUMS_64
#undef CK_SUMS_128
#undef CK_NAMES_32
#undef CK_NAMES_64
#undef CK_NAMES_128
#undef CK_WGMMA_SHARED
#undef CK_WGMMA_REGISTERS

}  // namespace ck::cuda

#endif
